"""A beam search over fillings: words for each gap in turn, with a sentinel ahead of each."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import Tensor


class Beam(NamedTuple):
    """A part of a filling: the tokens of each gap, and their log-probability."""

    gaps: tuple[tuple[int, ...], ...]
    score: float

    def ids(self, sentinels: Sequence[int]) -> list[int]:
        """Returns the decoder's text: each gap behind its sentinel."""
        return [token for sentinel, gap in zip(sentinels, self.gaps, strict=False) for token in (sentinel, *gap)]


def best_fillings(
    next_words: Callable[[Sequence[int]], Tensor],
    sentinels: Sequence[int],
    ends: Collection[int],
    special: Collection[int],
    beams: int,
    most_tokens: int,
    questions: int,
) -> list[Beam]:
    """Returns complete fillings, the most probable first, at most as many as `beams`.

    Args:
        next_words: returns the log-probabilities of all tokens behind the decoder's ids.
        sentinels: that of each gap, and one that ends the last gap.
        ends: other tokens that end the last gap.
        special: tokens that are no words; those above may be among them.
        most_tokens: the most tokens of a gap.
        questions: how often `next_words` may be called.
    """
    gaps = len(sentinels) - 1
    alive = [Beam(((),), 0.0)]
    complete: list[Beam] = []
    refused = {*sentinels, *ends, *special}
    while alive and questions > 0:
        grown: list[Beam] = []
        for beam in alive[:questions]:
            log_probs = next_words(beam.ids(sentinels))
            last = len(beam.gaps) == gaps
            for token in {sentinels[len(beam.gaps)], *(ends if last else ())}:
                ended = Beam(beam.gaps if last else (*beam.gaps, ()), beam.score + float(log_probs[token]))
                (complete if last else grown).append(ended)
            if len(beam.gaps[-1]) < most_tokens:
                best = log_probs.topk(min(beams + len(refused), len(log_probs)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                for token, score in [pair for pair in pairs if pair[0] not in refused][:beams]:
                    grown.append(Beam((*beam.gaps[:-1], (*beam.gaps[-1], token)), beam.score + score))
        questions -= len(alive)
        complete = _best(complete, beams)
        # Scores only fall: what is below the last complete one stays there.
        least = complete[-1].score if len(complete) == beams else float("-inf")
        alive = [beam for beam in _best(grown, beams) if beam.score > least]
    return complete


def _best(found: Sequence[Beam], count: int) -> list[Beam]:
    best: dict[tuple[tuple[int, ...], ...], Beam] = {}
    for beam in sorted(found, key=lambda one: (-one.score, one.gaps)):
        # The last gap may end in two ways.
        best.setdefault(beam.gaps, beam)
    return list(best.values())[:count]
