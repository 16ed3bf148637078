"""What a stage may lack: the share of its calls that may stay without a usable answer."""

from collections import Counter
from collections.abc import Sequence

from gubs.llm.calls import Answer
from gubs.llm.errors import IncompleteError
from gubs.llm.settings import ContractSettings

UNANSWERED = frozenset({"rejected", "context", "unreachable", "unreadable", "rate_limited"})
"""Causes that are not the answer's own: the endpoint gave none. All others are about what a model answered, or would
not answer."""
_LONGEST_EXAMPLE = 300


def require(answers: Sequence[Answer], settings: ContractSettings) -> None:
    """Ends the stage if too many of these answers are missing. Errors: see `Contract.check`."""
    Contract(settings).check(answers)


class Contract:
    """Counts a stage's answers and ends the stage once more of them are missing than the settings allow."""

    def __init__(self, settings: ContractSettings):
        self._settings = settings
        self._asked: Counter[str] = Counter()
        self._failed: dict[str, Counter[str]] = {}
        self._examples: dict[str, str] = {}

    def check(self, answers: Sequence[Answer]) -> None:
        """Counts the answers of a batch.

        Raises:
            IncompleteError: too many of a role's answers are missing so far; with causes and counts.
        """
        for answer in answers:
            self._asked[answer.role] += 1
            if not answer.ok:
                self._failed.setdefault(answer.role, Counter())[answer.failure] += 1
                self._examples.setdefault(answer.failure, f"{answer.label}: {answer.error}"[:_LONGEST_EXAMPLE])
        broken = [role for role in self._failed if self._broken(role)]
        if broken:
            raise IncompleteError("; ".join(map(self._explain, broken)) + f". {self._remedy()}")

    def _broken(self, role: str) -> bool:
        failed, asked = self._failed[role], self._asked[role]
        unanswered = sum(failed[cause] for cause in UNANSWERED)
        unusable = failed.total() - unanswered
        return unanswered > self._settings.unanswered * asked or unusable > self._settings.unusable * asked

    def _explain(self, role: str) -> str:
        failed = self._failed[role]
        causes = ", ".join(f"{cause} {n}" for cause, n in failed.most_common())
        example = self._examples[failed.most_common(1)[0][0]]
        return (
            f"incomplete: {failed.total()} of {self._asked[role]} answers of the {role} are missing "
            f"({causes}), for example {example}"
        )

    def _remedy(self) -> str:
        return (
            "Everything finished is kept and the same command resumes; "
            f"llm.contract.unusable={self._settings.unusable:g} and "
            f"llm.contract.unanswered={self._settings.unanswered:g} are the shares that may be missing"
        )
