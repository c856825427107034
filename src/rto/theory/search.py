r"""Proposition 3.2 as algorithms: search for the best response against an oracle that counts samples.

A *sample* is one whole response sent to the oracle. What comes back differs:

- `SentenceOracle`: one number, r(y). Nothing links responses, so all A^H must be asked.
- `TokenOracle`: the token reward β log π*/π_ref of each token on the path. As π_ref and β are known, that is
  π*(y_h|y_<h) of the tokens that were sampled, and of no other.
- `RowOracle`: the same for *all* tokens of each state on the path, before the next token is chosen. This is
  what a DPO model gives, whose logits are a row.

The target is argmax_y π*(y|x). With a uniform π_ref it is argmax_y r(y); with another it need not be.
"""

from dataclasses import dataclass, field
from math import exp, inf, log
from random import Random

from jaxtyping import Float
from torch import Tensor

from rto.theory.mdp import PrefixTree

Response = tuple[int, ...]
SLACK = 1e-9
"""Two log-probabilities closer than this are equal."""


@dataclass
class SentenceOracle:
    """Answers a response with r(y): here log π*(y|x), the same up to scale and shift if π_ref is uniform."""

    logp: Float[Tensor, "N A"]
    samples: int = 0

    def ask(self, response: Response) -> float:
        """r(y)."""
        self.samples += 1
        return sum(_walk(self.logp, response))


@dataclass
class TokenOracle:
    """Answers a response with one number a token, here log π*(y_h|y_<h)."""

    logp: Float[Tensor, "N A"]
    samples: int = 0

    def ask(self, response: Response) -> list[float]:
        """The token rewards along the response."""
        self.samples += 1
        return _walk(self.logp, response)


@dataclass
class RowOracle:
    """Shows all token rewards of a state as soon as a generation reaches it."""

    logp: Float[Tensor, "N A"]
    samples: int = 0

    def start(self) -> None:
        """Begin a generation."""
        self.samples += 1

    def row(self, prefix: Response) -> list[float]:
        """The row log π*(·|prefix)."""
        return [float(v) for v in self.logp[_node(prefix, self.logp.shape[1])]]


@dataclass(frozen=True)
class Found:
    """What a search returns: the best responses it knows, and what it paid for them."""

    best: frozenset[Response]
    samples: int


def _node(prefix: Response, vocabulary: int) -> int:
    node = 0
    for token in prefix:
        node = node * vocabulary + 1 + token
    return node


def _walk(logp: Float[Tensor, "N A"], response: Response) -> list[float]:
    return [float(logp[_node(response[:h], logp.shape[1]), token]) for h, token in enumerate(response)]


def _argmax(scores: dict[Response, float]) -> frozenset[Response]:
    top = max(scores.values())
    return frozenset(y for y, score in scores.items() if score >= top - SLACK)


def sentence_search(oracle: SentenceOracle, tree: PrefixTree, rng: Random) -> Found:
    """Ask every response once, in random order: A^H samples, and none may be left out.

    Whatever was answered before says nothing about a response not asked yet.
    """
    from_index = [tuple(int(t) for t in y) for y in tree.responses.tokens]
    rng.shuffle(from_index)
    scores = {y: oracle.ask(y) for y in from_index}
    return Found(_argmax(scores), oracle.samples)


@dataclass
class _Node:
    """A prefix the search has passed through."""

    logp: float
    children: "dict[int, _Node]" = field(default_factory=dict)
    closed: bool = False

    def bound(self, vocabulary: int, depth: int) -> float:
        """The largest log π*(y) a response below here that was not sampled could still have."""
        if depth == 0:
            return -inf
        best = max((c.bound(vocabulary, depth - 1) for c in self.children.values()), default=-inf)
        return max(best, self.unseen(vocabulary))

    def unseen(self, vocabulary: int) -> float:
        """The log of π*(prefix) (1 − Σ π* of the tokens seen): the most that a token not seen could have."""
        if len(self.children) == vocabulary:
            return -inf
        if not self.children:
            return self.logp
        if self.logp == -inf:
            return -inf
        rest = 1.0 - sum(exp(c.logp - self.logp) for c in self.children.values())
        return self.logp + log(rest) if rest > SLACK else -inf


def token_search(oracle: TokenOracle, tree: PrefixTree, xi: float, rng: Random) -> Found:
    r"""The algorithm in the proof of Proposition 3.2.

    Sample only paths that avoid visited nodes of
    𝒩 = {y_1:h : π*(y_1:h) < A^{−ξ} ≤ π*(y_1:h−1)} and 𝒩* = {y_1:H : π*(y) ≥ A^{−ξ}},
    until there are none; then rank 𝒩*. Each sample visits exactly one new node, so it takes |𝒩 ∪ 𝒩*| samples.

    Raises:
        ValueError: 𝒩* is empty: Assumption 3.1 does not hold with this ξ.
    """
    a, horizon = tree.vocabulary, tree.horizon
    threshold = -xi * log(a) - SLACK
    root, kept = _Node(0.0), dict[Response, float]()
    while not root.closed:
        node, path, response = root, [root], []
        for _ in range(horizon):
            open_tokens = [t for t in range(a) if t not in node.children or not node.children[t].closed]
            token = rng.choice(open_tokens)
            response.append(token)
            node = node.children.get(token, _Node(node.logp))
            path.append(node)
        y = tuple(response)
        logps = oracle.ask(y)
        for h, (token, logp) in enumerate(zip(y, logps)):
            child = path[h].children.setdefault(token, path[h + 1])
            child.logp = path[h].logp + logp
            if child.logp < threshold:
                child.closed = True
                break
        else:
            path[-1].closed = True
            kept[y] = path[-1].logp
        for node in reversed(path):
            node.closed |= len(node.children) == a and all(c.closed for c in node.children.values())
    if not kept:
        raise ValueError(f"𝒩* is empty: no response has π*(y|x) ≥ A^−{xi:g}")
    return Found(_argmax(kept), oracle.samples)


def bounded_search(oracle: TokenOracle, tree: PrefixTree, rng: Random) -> Found:
    """Best-first search on the same oracle that needs no ξ: probabilities sum to one.

    A token not yet seen has at most what the seen ones leave, π*(a|s) ≤ 1 − Σ_seen π*. Sample through the
    largest such bound; stop when it is not above the best response found. Returns one optimum.
    """
    a, horizon = tree.vocabulary, tree.horizon
    root, scores, top = _Node(0.0), dict[Response, float](), -inf
    while root.bound(a, horizon) > top + SLACK:
        node, response = root, list[int]()
        for depth in range(horizon, 0, -1):
            unseen = [t for t in range(a) if t not in node.children]
            options = {t: c.bound(a, depth - 1) for t, c in node.children.items()}
            best = max(options.values(), default=-inf)
            if unseen and node.unseen(a) >= best:
                token = rng.choice(unseen)
                response.append(token)
                response.extend(rng.randrange(a) for _ in range(depth - 1))
                break
            token = max(options, key=lambda t: options[t])
            response.append(token)
            node = node.children[token]
        y = tuple(response)
        node, logp = root, 0.0
        for token, step in zip(y, oracle.ask(y)):
            logp += step
            node = node.children.setdefault(token, _Node(logp))
        scores[y] = logp
        top = max(top, logp)
    one = min(_argmax(scores))
    return Found(frozenset({one}), oracle.samples)


def row_search(oracle: RowOracle, tree: PrefixTree) -> Found:
    """Search with whole rows: dive greedily from the most likely prefix not yet followed.

    Every dive ends below a prefix of its own with π* ≥ A^{−ξ}; such prefixes are disjoint, so there are at
    most A^ξ dives. Returns one optimum and needs no ξ.
    """
    waiting: dict[Response, float] = {(): 0.0}
    best: Response = ()
    top = -inf
    while waiting and max(waiting.values()) > top + SLACK:
        prefix = max(waiting, key=lambda p: waiting[p])
        logp = waiting.pop(prefix)
        oracle.start()
        while len(prefix) < tree.horizon:
            children = {(*prefix, t): logp + step for t, step in enumerate(oracle.row(prefix))}
            prefix = max(children, key=lambda p: children[p])
            logp = children.pop(prefix)
            waiting |= children
        if logp > top:
            best, top = prefix, logp
    return Found(frozenset({best}), oracle.samples)


def nodes_to_visit(logp: Float[Tensor, "N A"], tree: PrefixTree, xi: float) -> int:
    """|𝒩 ∪ 𝒩*|, by enumerating all prefixes."""
    threshold = -xi * log(tree.vocabulary) - SLACK
    count, level = 0, dict[Response, float]({(): 0.0})
    for _ in range(tree.horizon):
        level = {
            (*prefix, t): total + float(logp[_node(prefix, tree.vocabulary), t])
            for prefix, total in level.items()
            for t in range(tree.vocabulary)
        }
        count += sum(total < threshold for total in level.values())
        level = {prefix: total for prefix, total in level.items() if total >= threshold}
    return count + len(level)


def paper_bound(vocabulary: int, horizon: int, xi: float) -> float:
    """A^{min(ξ+1, H)}, as Proposition 3.2 states it."""
    return vocabulary ** min(xi + 1, float(horizon))


def proven_bound(vocabulary: int, horizon: int, xi: float) -> int:
    r"""1 + (A − 1) Σ_{d<H} min(A^d, ⌊A^ξ⌋): the most that |𝒩 ∪ 𝒩*| can be, attained by `instances.comb`.

    At most ⌊A^ξ⌋ prefixes of one depth have π* ≥ A^{−ξ}, as they are disjoint events. Those are the inner
    nodes of the tree whose leaves are 𝒩 ∪ 𝒩*, and an A-ary tree has 1 + (A − 1)·(inner nodes) leaves.
    It is at most 1 + H (A − 1) A^ξ: the exponent of the paper, with a factor of the order of H.
    """
    wide = int(vocabulary**xi + SLACK)
    return 1 + (vocabulary - 1) * sum(min(vocabulary**d, wide) for d in range(horizon))
