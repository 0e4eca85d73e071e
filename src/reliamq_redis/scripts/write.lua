-- Write down what became of entries, unless the lane is another member's by now.  May be repeated.
-- KEYS: the stream, the lane's state, its attempts, what is away by when, what is away.
-- ARGV: the group, the token, milliseconds of the lease ('0': give the lane back), then lists, each after its length:
-- ids that are finished, ids whose attempts may go, ids and attempts (two for each); and for each that goes away: its
-- id, the milliseconds for which, how many fields and values follow, these.
-- Returns 1, or 0 when the lane is another member's.
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[2], 'died')  -- what follows from that is written here; besides, as in acquire.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local place = 4
local function list(width, change)
  local count = tonumber(ARGV[place]) * width
  local first, last = place + 1, place + count
  for start = first, last, 4000 do  -- what a call can have at once
    change(start, math.min(last, start + 3999))
  end
  place = last + 1
end
list(1, function(from, to) redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, from, to)) end)
list(1, function(from, to) redis.call('HDEL', KEYS[3], unpack(ARGV, from, to)) end)
list(2, function(from, to) redis.call('HSET', KEYS[3], unpack(ARGV, from, to)) end)
while place <= #ARGV do
  local id, last = ARGV[place], place + 2 + ARGV[place + 2]
  local fields = cmsgpack.pack({unpack(ARGV, place + 3, last)})
  if redis.call('XACK', KEYS[1], ARGV[1], id) == 1 then
    redis.call('HSET', KEYS[5], id, fields)
    redis.call('ZADD', KEYS[4], now + ARGV[place + 1], id)
    redis.call('HDEL', KEYS[3], id)
  end
  place = last + 1
end
if ARGV[3] == '0' then
  redis.call('HDEL', KEYS[2], 'member', 'until')
else
  redis.call('HSET', KEYS[2], 'until', now + ARGV[3])
end
return 1
