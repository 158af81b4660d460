"""What several test files share: paths, comparisons, tiny networks, released conversations and toy runs."""
