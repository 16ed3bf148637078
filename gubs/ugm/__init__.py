"""User Group Manager (UGM): makes group profiles in three phases, summarize -> cluster -> reflect."""
