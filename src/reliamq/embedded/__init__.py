"""The embedded broker: durable, for one machine, on SQLite; a backend like any other, reached by its entry point."""
