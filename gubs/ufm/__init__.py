"""The UFM: the user feedback model, its examples, rewards, advantages, loss, sampling and training (paper: method, A.5)."""
