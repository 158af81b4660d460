"""Reports: the paper's tables with measured rows beside the published ones, and plots."""
