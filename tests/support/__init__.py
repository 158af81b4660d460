"""What several test files share: paths, comparisons, tiny networks, conversations, toy runs."""
