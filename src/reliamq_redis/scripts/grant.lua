-- Take a lease, unless somebody has it or its effect is done.
-- KEYS: the lease.
-- ARGV: its milliseconds, those for which it is remembered after them, the name of this claim, and those of earlier
-- ones whose answers were lost: what was granted to one of these nobody has.
-- Returns 'granted' and the token; 'busy' and for how many milliseconds; 'done' and the kept result.
-- A token is the time in milliseconds, or one more than the last where that is not less.  So it is larger than every
-- one before, also than those that a failover has forgotten.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local state = redis.call('HMGET', KEYS[1], 'token', 'until', 'claim', 'done', 'result')
if state[4] then
  redis.call('HSET', KEYS[1], 'done', 1)  -- nothing new; but WAIT waits for what its own connection has written
  return {'done', state[5]}
end
local left = tonumber(state[2] or 0) - now
for place = 4, #ARGV do
  if ARGV[place] == state[3] then
    left = 0
  end
end
if left > 0 then
  return {'busy', left}
end
local token = math.max(now, tonumber(state[1] or 0) + 1)
redis.call('HSET', KEYS[1], 'token', token, 'until', now + ARGV[1], 'claim', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1] + ARGV[2])
return {'granted', token}
