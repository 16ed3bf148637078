"""Which records, profiles and random seeds a training step uses: all of it a function of the step, none of it state.

A resumed run therefore continues with the step's number alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gubs.errors import InputError


class BalancedSampler:
    """Draws the records of each step so that the gold options are balanced (A.5: against reward hacking).

    The draws of a run are one long round robin over the options, cut into batches: with four options a batch of 4 holds
    one of each, and a batch of 6 has its two extra records from A and B, then from C and D. Each option walks its
    records in a shuffled order, and in a new one each time it comes to their end.

    A record can stand twice in a batch (an option with fewer records than it has places, or the end of one walk and the
    start of the next), so a group's id must name the place in the batch and not the record alone.
    """

    def __init__(
        self, golds: Sequence[str], options: Sequence[str], batch: int, seed: int, allow_missing: bool = False
    ) -> None:
        """Indexes the records.

        Args:
            golds: gold option of each record.
            options: options to balance over, in the order in which they take their places (`TASK_OPTIONS[task]`).
            batch: records per step over all ranks, at least 1.
            seed: of the run.
            allow_missing: balance over the options that have records, instead of raising.

        Raises:
            InputError: an option has no records, or a record's gold is not an option. ValueError: batch below 1.
        """
        if batch < 1:
            raise ValueError(f"a batch of {batch} records")
        gold = np.asarray([str(g) for g in golds], dtype=np.str_)
        names = [str(o) for o in options]
        _refuse_strangers(gold, names)
        records = {name: np.flatnonzero(gold == name) for name in names}
        missing = [name for name in names if not len(records[name])]
        if missing and (not allow_missing or len(missing) == len(names)):
            raise InputError(
                f"no training record has the gold option {', '.join(missing)}, so the options "
                f"{', '.join(names)} cannot be balanced: make more examples, or allow missing options"
            )
        self._records = {name: index for name, index in records.items() if len(index)}
        self._seed, self._size = seed, batch
        self.missing = tuple(missing)
        """Options that have no records and are left out."""

    def batch(self, step: int) -> list[int]:
        """Indices into `golds` of the step's records.

        Args:
            step: from 0.

        Raises:
            ValueError: step below 0.
        """
        walks: dict[tuple[str, int], npt.NDArray[np.intp]] = {}
        picked = []
        for option, nth in self._places(step):
            around, at = divmod(nth, len(self._records[option]))
            if (option, around) not in walks:
                walks[option, around] = self._walk(option, around)
            picked.append(int(walks[option, around][at]))
        return picked

    def resampled(self, step: int) -> dict[str, int]:
        """How many of the step's records of each option had been drawn before in the run."""
        again = Counter(o for o, nth in self._places(step) if nth >= len(self._records[o]))
        return {option: again[option] for option in self._records}

    def figures(self, step: int) -> dict[str, float]:
        """For the log: each option's share of the step's batch, and how often its records have been used up so far."""
        places = self._places(step)
        share = Counter(option for option, _ in places)
        passes = {o: self._drawn(i, step + 1) / len(index) for i, (o, index) in enumerate(self._records.items())}
        return {f"balance/{o}": share[o] / self._size for o in self._records} | {
            f"passes/{o}": value for o, value in passes.items()
        }

    def _places(self, step: int) -> list[tuple[str, int]]:
        """(option, how many of it were drawn before in the run) of each place of the step's batch."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        options = list(self._records)
        first = step * self._size
        return [(options[i % len(options)], i // len(options)) for i in range(first, first + self._size)]

    def _drawn(self, option: int, steps: int) -> int:
        """Records of the option drawn in the first `steps` steps."""
        options = len(self._records)
        return (steps * self._size - option + options - 1) // options

    def _walk(self, option: str, around: int) -> npt.NDArray[np.intp]:
        """The option's records in the order of its walk number `around`."""
        rng = np.random.default_rng(_stable_hash("walk", self._seed, option, around))
        return rng.permutation(self._records[option])


@dataclass(frozen=True, slots=True)
class Sampled:
    """Whose profiles complement the training user's (paper: profile sampling)."""

    similar: str | None
    """u_S, another member of one of the user's groups; None = there is none, u_T replaces it."""
    group: str | None
    """A group of the user; None = there is none, u_T replaces P_g."""


def profile_sampling(
    user: str,
    step_seed: int,
    memberships: Mapping[str, Sequence[str]],
    members: Mapping[str, Sequence[str]],
    *,
    anybody: Sequence[str] = (),
    rather: Collection[str] = (),
) -> Sampled:
    """Draws the similar user, evenly from all others in any of the user's groups, and the group, evenly.

    Depends on the arguments' contents only, not on the order in which groups and members are listed.

    Args:
        user: u_T.
        step_seed: of this draw; the same seed gives another user another draw.
        memberships: user -> ids of the groups the user belongs to.
        members: group id -> its users.
        anybody: draw the similar user from these instead.
        rather: draw from those of them who are among these, if there are any.
    """
    groups = sorted(set(memberships.get(user, ())))
    others = sorted({*(anybody or (m for g in groups for m in members.get(g, ())))} - {user})
    others = [o for o in others if o in rather] or others
    rng = np.random.default_rng(_stable_hash("profiles", step_seed, user))
    group = groups[rng.integers(len(groups))] if groups else None
    similar = others[rng.integers(len(others))] if others else None
    return Sampled(similar, group)


def shuffled(names: Collection[str], seed: int) -> dict[str, str]:
    """Each name -> another one, each of them once; drawn evenly from the cyclic permutations. A single name stays."""
    order = np.random.default_rng(_stable_hash("shuffled", seed)).permutation(sorted(names)).tolist()
    return dict(zip(order, order[1:] + order[:1], strict=True))


def sample_seed(run_seed: int, step: int, group_id: int | str, role: str, k: int) -> int:
    """Seed of one sample, in [0, 2**63): the same in every process and every run, and another for each argument.

    Args:
        run_seed: of the run.
        step: training step.
        group_id: the sample's group.
        role: T, S or G.
        k: number of the sample among those of its role.
    """
    return _stable_hash("sample", run_seed, step, group_id, str(role), k)


def _refuse_strangers(gold: npt.NDArray[np.str_], options: Sequence[str]) -> None:
    strangers = np.flatnonzero(~np.isin(gold, options))
    if len(strangers):
        at = strangers[0]
        raise InputError(
            f"{len(strangers)} training records have a gold option that is none of {', '.join(options)}, "
            f"first record {at} with {str(gold[at])!r}: leave them out"
        )


def _stable_hash(*parts: Any) -> int:
    """63 bits of the parts; Python's own hash of a text differs from process to process."""
    text = json.dumps(parts, default=lambda number: number.item())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
