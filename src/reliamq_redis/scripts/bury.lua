-- Keep a dead letter; one with the same name is replaced.
-- KEYS: the order of all, this one.  ARGV: its name, when it died (microseconds), its fields and values.
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 3))
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
return 1
