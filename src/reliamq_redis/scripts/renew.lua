-- Renew a lease, or give it back, unless a later one was granted or its effect is done.
-- One that a failover has forgotten is there again by this.
-- KEYS: the lease.  ARGV: its token, its milliseconds ('0': it is given back), those for which it is remembered then.
-- Returns 1, or 0.
local state = redis.call('HMGET', KEYS[1], 'token', 'done')
if state[2] or tonumber(state[1] or 0) > tonumber(ARGV[1]) then
  return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'until', now + ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2] + ARGV[3])
return 1
