"""Ablations: grids of trainings that differ in a few settings, and what each is worth (`gubs ablate`)."""
