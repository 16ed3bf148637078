"""Training users that no policy is trained on: its calibration, its thresholds and its quality are measured on them."""

import hashlib
from dataclasses import dataclass

_SALT = "held out of training"


@dataclass(frozen=True)
class HeldOut:
    """The held-out users among the training users: `user in held_out`.

    Each is drawn by a hash of their own id, so that other users do not move them. SFT, GA-GRPO and distillation leave
    their targets out. Their histories may still be shown to the policy, as those of similar users are.
    """

    share: float
    """Of the training users (`ufm.held_out`)."""
    seed: int

    def __contains__(self, user_id: str) -> bool:
        """Whether this user is held out."""
        digest = hashlib.blake2b(f"{_SALT} {self.seed} {user_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.share
