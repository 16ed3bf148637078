"""The user feedback model (UFM): examples, rewards, advantages, loss, sampling and training (paper: method, A.5)."""
