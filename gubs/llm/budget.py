"""What calls may cost: a budget over everything that stands in the journal, and the estimate made before spending."""

from dataclasses import dataclass, field

from gubs.llm.journal import Journal, Spent
from gubs.llm.settings import BudgetSettings

_ENOUGH = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Expected cost of one call or of several."""

    tokens_in: int
    tokens_out: int
    money: float

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return self.tokens_in + self.tokens_out


class Budget:
    """Lets calls pass while they fit.

    What is in flight counts with its estimate until its true cost is known, so the budget is not overrun by more than
    the estimates err; the number of calls is exact.
    """

    def __init__(self, settings: BudgetSettings, journal: Journal):
        self._settings, self._journal = settings, journal
        self._held: dict[str, Cost] = {}
        self._held_tokens, self._held_money = 0, 0.0

    def fits(self, cost: Cost) -> bool:
        """Whether one more call of that cost may be made."""
        return not self._broken(cost)

    def hold(self, key: str, cost: Cost) -> None:
        """Reserves the cost of a call that is sent."""
        self.release(key)
        self._held[key] = cost
        self._held_tokens += cost.tokens
        self._held_money += cost.money

    def release(self, key: str) -> None:
        """Gives a reservation back: the call's true cost is in the journal, or it was not made."""
        cost = self._held.pop(key, None)
        if cost:
            self._held_tokens -= cost.tokens
            self._held_money -= cost.money

    def story(self, cost: Cost) -> str:
        """Which limit is hit, and how to raise it."""
        spent, limits = self._journal.total, self._settings
        name = self._broken(cost)[0]
        used = {"calls": spent.calls, "tokens": spent.tokens, "money": round(spent.money, 4)}[name]
        limit = f"llm.budget.{name}={getattr(limits, name)}"
        return f"the budget {limit} is used up ({used} spent, the next call does not fit)"

    def _broken(self, cost: Cost) -> list[str]:
        spent = self._journal.total
        after = {
            "calls": spent.calls + len(self._held) + 1,
            "tokens": spent.tokens + self._held_tokens + cost.tokens,
            "money": spent.money + self._held_money + cost.money,
        }
        return [name for name, value in after.items() if 0 < getattr(self._settings, name) < value]


def mean_output(spent: Spent | None, max_tokens: int) -> int:
    """Output tokens to expect of a call: the role's mean so far, or the most allowed while there are few calls."""
    if spent is None or spent.calls < _ENOUGH:
        return max_tokens
    return max(1, round(spent.tokens_out / spent.calls))


@dataclass
class RolePlan:
    """What a role's requests would cost."""

    role: str
    endpoint: str
    model: str
    requests: int = 0
    journaled: int = 0
    """Requests the journal answers, for nothing."""
    calls: int = 0
    """Calls to be made, without re-asks of answers that turn out unusable."""
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0


@dataclass
class Plan:
    """What a batch would cost. Tokens are estimates: see `estimate_tokens` for input and `mean_output` for output."""

    roles: dict[str, RolePlan] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Calls to be made."""
        return sum(r.calls for r in self.roles.values())

    @property
    def tokens(self) -> int:
        """Input and output tokens of these calls."""
        return sum(r.tokens_in + r.tokens_out for r in self.roles.values())

    @property
    def money(self) -> float:
        """Their price, in the currency of the endpoints' prices."""
        return sum(r.money for r in self.roles.values())
