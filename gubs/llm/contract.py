"""What a stage may lack: the share of its calls that may stay without a usable answer."""

from collections import Counter
from collections.abc import Mapping, Sequence

from gubs.llm.calls import Answer
from gubs.llm.errors import IncompleteError
from gubs.llm.settings import ContractSettings

UNANSWERED = frozenset({"unreachable", "unreadable", "rate_limited"})
"""Causes that say something about the endpoint at that time. All others are about the request or its answer."""
NOT_TAKEN = frozenset({"rejected", "context"})
"""Causes for which the endpoint refuses a request, and will refuse the same one again."""
_LONGEST_EXAMPLE = 300
_ADVICE = {
    "context": "use an endpoint with a longer context (of the embedded server: llm.embedded.max_model_len)",
    "rejected": "change what the server names",
    "unreachable": "if the same ones fail again, llm.contract.unanswered can allow for them",
}

Missing = dict[str, dict[str, int]]
"""Number of missing answers by role and cause, most frequent first; roles that lack none are left out."""


class Contract:
    """Counts a stage's answers, over all of its batches, and ends the stage once more of them are missing than the
    settings allow.
    """

    def __init__(self, settings: ContractSettings, *, replaced: bool = False, advice: Mapping[str, str] | None = None):
        """
        Args:
            settings: the shares that may be missing.
            replaced: the stage has something better than an answer that cannot be used: such answers are counted, but
                do not end it. What the endpoint did not take or not answer does.
            advice: what to change, by cause, where the same command would fail again.
        """
        self._settings, self._replaced = settings, replaced
        self._advice = {**_ADVICE, **(advice or {})}
        self.asked: Counter[str] = Counter()
        """Number of requests by role."""
        self._missing: dict[str, Counter[str]] = {}
        self._examples: dict[tuple[str, str], str] = {}

    @property
    def missing(self) -> Missing:
        """What is missing so far."""
        return {role: dict(causes.most_common()) for role, causes in self._missing.items()}

    def check(self, answers: Sequence[Answer]) -> None:
        """Counts the answers of a batch.

        Raises:
            IncompleteError: too many of a role's answers are missing so far; with causes and counts.
        """
        for answer in answers:
            self.asked[answer.role] += 1
            if not answer.ok:
                self._missing.setdefault(answer.role, Counter())[answer.failure] += 1
                example = f"{answer.label}: {answer.error}"[:_LONGEST_EXAMPLE]
                self._examples.setdefault((answer.role, answer.failure), example)
        if broken := [role for role in self._missing if self._broken(role)]:
            raise IncompleteError("; ".join(map(self._explain, broken)) + f". {self._remedy(broken)}")

    def _broken(self, role: str) -> bool:
        missing, asked = self._missing[role], self.asked[role]
        unanswered = sum(missing[cause] for cause in UNANSWERED)
        not_taken = sum(missing[cause] for cause in NOT_TAKEN)
        unusable = not_taken if self._replaced else missing.total() - unanswered
        return unanswered > self._settings.unanswered * asked or unusable > self._settings.unusable * asked

    def _explain(self, role: str) -> str:
        missing = self._missing[role]
        example = self._examples[role, missing.most_common(1)[0][0]]
        return f"incomplete: {in_words(role, missing, self.asked[role])}, for example {example}"

    def _remedy(self, roles: Sequence[str]) -> str:
        """What the same command would do, in truth, and what else helps."""
        causes = {cause for role in roles for cause in self._missing[role]}
        lasting = sorted(causes & NOT_TAKEN)
        parts = ["Everything finished is kept and the same command resumes"]
        if lasting:
            parts = [f"Everything finished is kept, but what is refused ({', '.join(lasting)}) will be refused again"]
            parts += [self._advice[cause] for cause in lasting]
        parts += [self._advice[cause] for cause in sorted(causes - NOT_TAKEN) if cause in self._advice]
        shares = f"{self._settings.unusable:g} and llm.contract.unanswered={self._settings.unanswered:g}"
        return "; ".join([*parts, f"llm.contract.unusable={shares} are the shares that may be missing"])


def in_words(role: str, missing: Mapping[str, int], asked: int) -> str:
    """How many of a role's answers are missing, and why."""
    causes = ", ".join(f"{cause} {n}" for cause, n in missing.items())
    return f"{sum(missing.values()):,} of {asked:,} answers of the {role} are missing ({causes})"
