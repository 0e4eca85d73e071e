-- Remove what every group has finished and what is older than it must be kept.
-- KEYS: the stream.
-- ARGV: milliseconds for which it is kept, how many are removed at most, names of groups that must be there.
-- Returns how many entries were removed, the oldest that a group has not finished ('': none), and that group;
-- -1 when a group is missing: then nothing is removed, because nobody knows what it has finished.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {-1, '', ''}
end
local function parts(id)
  local time, number = string.match(id, '(%d+)-(%d+)')
  return tonumber(time), tonumber(number)
end
local function less(one, other)
  local time, number = parts(one)
  local others_time, others_number = parts(other)
  return time < others_time or (time == others_time and number < others_number)
end
local known, limit, slowest = {}, nil, ''
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group, first = info[2], nil
  known[group] = true
  if info[6] > 0 then
    first = redis.call('XPENDING', KEYS[1], group, '-', '+', 1)[1][1]
  else
    local time, number = string.match(info[8], '(%d+)-(%d+)')
    first = time .. '-' .. string.format('%.0f', number + 1)
  end
  if limit == nil or less(first, limit) then
    limit, slowest = first, group
  end
end
for place = 3, #ARGV do
  if not known[ARGV[place]] then
    return {-1, '', ARGV[place]}
  end
end
if limit == nil then
  return {-1, '', ''}
end
local time = redis.call('TIME')
local kept = string.format('%.0f-0', time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[1])
local removed = redis.call('XTRIM', KEYS[1], 'MINID', '~', less(kept, limit) and kept or limit, 'LIMIT', ARGV[2])
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not newest or less(newest[1], limit) then
  return {removed, '', slowest}
end
return {removed, limit, slowest}
