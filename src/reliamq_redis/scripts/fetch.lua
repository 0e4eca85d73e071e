-- Take entries out of a lane for its group, renew the lease, and bring back what has waited long enough.
-- KEYS: the stream, the lane's state, what is away by when, what is away.
-- ARGV: the group, the token, milliseconds of the lease, from where ('>': new ones), how many at most.
-- Returns false when the lane is another member's; else: the group's position before, the entries, milliseconds until
-- the next one comes back (-1: none).
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[2] then
  return false
end
redis.call('HDEL', KEYS[2], '-')  -- as in acquire.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[2], 'until', now + ARGV[3])
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 100)
for _, id in ipairs(due) do
  local fields = redis.call('HGET', KEYS[4], id)
  if fields then
    redis.call('XADD', KEYS[1], '*', unpack(cmsgpack.unpack(fields)))
  end
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZREM', KEYS[3], id)
end
local position = '0-0'
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  if info[2] == ARGV[1] then
    position = info[8]
  end
end
local read = redis.call('XREADGROUP', 'GROUP', ARGV[1], 'lane', 'COUNT', ARGV[5], 'STREAMS', KEYS[1], ARGV[4])
local left = -1
local first = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
if first[2] then
  left = math.max(0, first[2] - now)
end
return {position, read and read[1][2] or {}, left}
