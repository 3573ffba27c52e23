"""What several test files share: toys, oracles, runners."""
