"""What measurements say: pure functions over finished runs."""
