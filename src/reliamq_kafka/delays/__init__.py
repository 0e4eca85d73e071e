"""Long retries: where they wait, and how they come back."""
