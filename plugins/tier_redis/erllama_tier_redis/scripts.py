"""What has to happen at once on the server, as scripts that it runs whole."""

from __future__ import annotations

from typing import Final

LOG_LENGTH: Final = 100_000
"""Entries of the log; who has fallen further behind scans everything."""

PUT: Final = f"""
-- keys: object, sizes, used, bytes, log
-- args: name, data, now (ms), quota (0: none), expiry (ms, 0: never)
local before = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
if before > 0 and redis.call('EXISTS', KEYS[1]) == 0 then
    redis.call('DECRBY', KEYS[4], before)
    redis.call('HDEL', KEYS[2], ARGV[1])
    before = 0
end
local total = tonumber(redis.call('GET', KEYS[4]) or 0)
local size = #ARGV[2]
if tonumber(ARGV[4]) > 0 and total - before + size > tonumber(ARGV[4]) then
    return {{0, total}}
end
-- The value first: where the server has no memory left, nothing else has happened.
if tonumber(ARGV[5]) > 0 then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[5])
else
    redis.call('SET', KEYS[1], ARGV[2])
end
redis.call('HSET', KEYS[2], ARGV[1], size)
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', {LOG_LENGTH}, '*', 'put', ARGV[1])
return {{1, redis.call('INCRBY', KEYS[4], size - before)}}
"""

DELETE: Final = f"""
-- keys: object, sizes, used, bytes, log
-- args: name
local size = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
local there = redis.call('DEL', KEYS[1])
if size > 0 then
    redis.call('HDEL', KEYS[2], ARGV[1])
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('DECRBY', KEYS[4], size)
    redis.call('XADD', KEYS[5], 'MAXLEN', '~', {LOG_LENGTH}, '*', 'del', ARGV[1])
end
return {{there * size, tonumber(redis.call('GET', KEYS[4]) or 0)}}
"""

FORGET: Final = """
-- An object that expired, or was removed by others than erllama.
-- keys: object, sizes, used, bytes
-- args: name
if redis.call('EXISTS', KEYS[1]) == 0 then
    local size = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
    redis.call('HDEL', KEYS[2], ARGV[1])
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('DECRBY', KEYS[4], size)
end
return tonumber(redis.call('GET', KEYS[4]) or 0)
"""

LEAD: Final = """
-- keys: janitor; args: who, lease (ms)
local leads = redis.call('GET', KEYS[1])
if not leads or leads == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return 1
end
return 0
"""

RESIGN: Final = """
-- keys: janitor; args: who
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end
return 0
"""
