"""The paper's theory on MDPs small enough to solve exactly; needs no language model.

`mdp` solves, `search` is Proposition 3.2, `preferences` and `pessimism` are Algorithm 1 and Theorem 4.2,
`stochastic` is Proposition C.2, `identities`, `gradients` and `miniature` run `rto.functional` on enumerated
responses. ``python -m rto.theory --output_dir DIR`` measures it all and writes a page.
"""
