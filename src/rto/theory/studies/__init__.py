"""One module a part of the theory: it measures, draws, and says what it found."""

from collections.abc import Callable

from rto.theory.page import Section
from rto.theory.studies import dense, fitting, identities, pessimism, search

Study = Callable[[int, bool], Section]
"""(seed, quick) to a section of the page."""

STUDIES: dict[str, Study] = {
    "identities": identities.study,
    "search": search.study,
    "pessimism": pessimism.study,
    "fitting": fitting.study,
    "dense": dense.study,
}
