-- Remove a dead letter, unless it has died again since.
-- KEYS: the order of all, this one.  ARGV: its name, when it died (microseconds).
-- Returns how many were removed.
local died = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not died or tonumber(died) ~= tonumber(ARGV[2]) then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
