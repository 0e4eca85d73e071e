-- Add messages to one lane's stream, each unless nobody would receive it.
-- KEYS: the stream.
-- ARGV: for each message: the group that it is for or '', how many fields and values follow, these.
-- Returns for each message: the entry's id; false where no group would receive it; the server's error.
local groups, any = {}, false
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    groups[info[2]], any = true, true
  end
end
local outcomes, place = {}, 1
while place <= #ARGV do
  local group, count = ARGV[place], tonumber(ARGV[place + 1])
  if not any or (group ~= '' and not groups[group]) then
    outcomes[#outcomes + 1] = false
  else
    outcomes[#outcomes + 1] = redis.pcall('XADD', KEYS[1], '*', unpack(ARGV, place + 2, place + 1 + count))
  end
  place = place + 2 + count
end
return outcomes
