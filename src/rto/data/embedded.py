"""The embedded task under the name that recipes knew it by before it had a room of its own: `rto.demo.embedded`."""

from rto.demo.embedded import *  # noqa: F403  (recipes name functions by "module:function"; a rename would break theirs)
