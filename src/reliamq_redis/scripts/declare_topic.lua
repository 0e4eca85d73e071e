-- Write down what a topic is declared with, unless it is declared already, and name its groups.
-- KEYS: the topic's facts, the set of its groups.
-- ARGV: how many names and values of facts follow, these, names of groups.
-- Returns the facts as they are now.
local count = tonumber(ARGV[1])
for place = 2, count, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[place], ARGV[place + 1])
end
for place = count + 2, #ARGV do
  redis.call('SADD', KEYS[2], ARGV[place])
end
return redis.call('HGETALL', KEYS[1])
