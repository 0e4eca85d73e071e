-- Add messages to one lane's stream, each unless nobody would receive it.
-- KEYS: the stream.
-- ARGV: for each message: the group that it is for or '', the number of its chain or 0, how many fields and values
-- follow, these.
-- Returns for each message: the entry's id; false where no group would receive it; 0 where one before it in its chain
-- was not stored; the server's error.
local groups, any = {}, false
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    groups[info[2]], any = true, true
  end
end
local outcomes, stopped, place = {}, {}, 1
while place <= #ARGV do
  local group, chain, count = ARGV[place], ARGV[place + 1], tonumber(ARGV[place + 2])
  local outcome = 0
  if not stopped[chain] then
    if any and (group == '' or groups[group]) then
      outcome = redis.pcall('XADD', KEYS[1], '*', unpack(ARGV, place + 3, place + 2 + count))
    else
      outcome = false
    end
    stopped[chain] = chain ~= '0' and type(outcome) ~= 'string'
  end
  outcomes[#outcomes + 1] = outcome
  place = place + 3 + count
end
return outcomes
