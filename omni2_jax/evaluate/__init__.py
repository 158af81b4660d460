"""Measuring a spoken language model: tasks, systems, recognisers and reports (paper section 4)."""
