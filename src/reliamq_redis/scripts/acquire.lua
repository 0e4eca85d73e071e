-- Have a lane, if nobody has it.
-- KEYS: the stream, the lane's state, its attempts.
-- ARGV: the group, the member, milliseconds of its lease.
-- Returns: the token, or 0 while another member has it; whether the group was made anew; whether the member before
-- died; the group's position; up to which entry somebody may have died over; the attempts; the time, milliseconds.
redis.call('HDEL', KEYS[2], '-')  -- a full server lets go on who began with a write that it allows: this drains it
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local state = redis.call('HMGET', KEYS[2], 'member', 'until', 'suspect', 'died')
local holder, till, suspect = state[1], tonumber(state[2] or 0), state[3] or '0-0'
if holder and holder ~= ARGV[2] and till > now then
  return {0}
end
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
local anew = made.err == nil
if not anew and not string.find(made.err, 'BUSYGROUP', 1, true) then
  return made
end
local position = '0-0'
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  if info[2] == ARGV[1] then
    position = info[8]
  end
end
-- Also where whoever found that out has written nothing since, and has it anew
local died = holder and (holder ~= ARGV[2] or state[4] == '1')
if died then
  suspect = position
end
-- By the clock, so that it grows also where a failover forgot some
local token = math.max(now, tonumber(redis.call('HGET', KEYS[2], 'token') or 0) + 1)
redis.call('HSET', KEYS[2], 'member', ARGV[2], 'until', now + ARGV[3], 'suspect', suspect,
  'died', died and 1 or 0, 'token', string.format('%.0f', token))
return {token, anew and 1 or 0, died and 1 or 0, position, suspect, redis.call('HGETALL', KEYS[3]), now}
