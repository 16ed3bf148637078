"""gubs: learns why users skip videos (group-aware user behaviour simulation, G-UBS) on Ray.

Importing this package stays light: torch, ray, vllm and transformers are imported where they are used.
"""

__version__ = "0.1.0"
