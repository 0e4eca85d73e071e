"""What is there for topics, groups and dead letters, and how it is named."""
