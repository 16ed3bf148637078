"""What calls may cost: a budget over every attempt in the journal, and an estimate before anything is spent."""

from dataclasses import dataclass, field

from gubs.llm.calls import Cost
from gubs.llm.journal import Journal
from gubs.llm.settings import BudgetSettings

_MIN_CALLS = 5
"""Calls of a role after which the mean length of its answers is trusted."""


class Budget:
    """Admits calls while they fit.

    An attempt in flight counts with its estimate until its true cost is known, so the budget is overrun by no more than
    the estimates err. The number of attempts is exact.
    """

    def __init__(self, settings: BudgetSettings, journal: Journal):
        self._settings, self._journal = settings, journal
        self._reserved: dict[str, list[Cost]] = {}
        self._total_reserved = Cost()

    def fits(self, cost: Cost) -> bool:
        """Whether a call of that cost may be made."""
        return not self._exceeded(cost)

    def reserve(self, key: str, cost: Cost) -> None:
        """Reserves the cost of an attempt of a call."""
        self._reserved.setdefault(key, []).append(cost)
        self._total_reserved.add(cost)

    def spent(self, key: str) -> None:
        """Ends one reservation of a call: the attempt's true cost is in the journal."""
        if costs := self._reserved.get(key):
            self._total_reserved.add(costs.pop(), -1)

    def release(self, key: str) -> None:
        """Ends all reservations of a call: it has ended, or was not made."""
        for cost in self._reserved.pop(key, ()):
            self._total_reserved.add(cost, -1)

    def explain(self, cost: Cost) -> str:
        """Which limit a call of that cost would exceed."""
        name = self._exceeded(cost)[0]
        limit = f"llm.budget.{name}={getattr(self._settings, name)}"
        used = round(getattr(self._journal.total, name), 4)
        return f"the budget {limit} is used up ({used} spent, the next call does not fit)"

    def _exceeded(self, cost: Cost) -> list[str]:
        costs = (self._journal.total, self._total_reserved, cost)
        after = {name: sum(getattr(c, name) for c in costs) for name in BudgetSettings.model_fields}
        return [name for name, value in after.items() if 0 < getattr(self._settings, name) < value]


def mean_output(spent: Cost | None, max_tokens: int) -> int:
    """Output tokens to expect of a call: the role's mean so far, or its maximum after too few calls."""
    if spent is None or spent.calls < _MIN_CALLS:
        return max_tokens
    return max(1, round(spent.tokens_out / spent.calls))


@dataclass(kw_only=True)
class RoleCost(Cost):
    """What a role's requests would cost, without re-asks after unusable answers."""

    role: str
    endpoint: str
    model: str
    requests: int = 0
    journaled: int = 0
    """Requests that the journal answers for free."""


@dataclass
class CostEstimate:
    """What a batch would cost. Tokens are estimates: `estimate_tokens` for the input, `mean_output` for the output."""

    roles: dict[str, RoleCost] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Calls to make."""
        return sum(r.calls for r in self.roles.values())
