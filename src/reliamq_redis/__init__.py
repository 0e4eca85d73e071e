"""reliamq on Redis Streams, for Redis 6.2 and later and Valkey: a plugin of reliamq."""
