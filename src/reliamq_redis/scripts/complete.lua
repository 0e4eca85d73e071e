-- Mark an effect as done, unless a later lease was granted or it is done already.
-- KEYS: its lease.  ARGV: the token, milliseconds for which the mark is kept, '1' where an answer to this was lost (so
-- that what it has done counts), the result, where there is one.
-- Returns 1, or 0.
local state = redis.call('HMGET', KEYS[1], 'token', 'done')
local newest = tonumber(state[1] or 0)
if newest > tonumber(ARGV[1]) or (state[2] and (newest < tonumber(ARGV[1]) or ARGV[3] ~= '1')) then
  return 0
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'done', 1)
redis.call('HDEL', KEYS[1], 'until', 'claim')
if ARGV[4] then
  redis.call('HSET', KEYS[1], 'result', ARGV[4])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
