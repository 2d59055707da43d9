"""The Lua scripts that make each change of the registry in Redis atomic, and the layout of its keys.

    {prefix}:schema              hash    version, registry_id
    {prefix}:v1:adapter:{name}   string  the adapter as JSON
    {prefix}:v1:names            hash    name or alias -> name of the adapter: one namespace
    {prefix}:v1:digests          hash    digest -> number of adapters that have it as a version
    {prefix}:v1:revision         string  number of changes so far
    {prefix}:v1:changes          stream  id "{revision}-0": kind, record, force; bounded
    {prefix}:v1:request:{id}     hash    fingerprint, kind, record, revision: the answer to a repeated request, for a day
    {prefix}:v1:garbage          hash    digest -> JSON {revision, until, deleting}: images without a name, see ImageCollector
    {prefix}:v1:members          hash    control plane -> JSON {seen, draining, expires}

A script answers with a list whose first element says how it went. Python makes all JSON; the scripts only read it.
"""

SCHEMA_VERSION = "1"

# KEYS: schema. ARGV: schema version, a new registry id.
OPEN = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'version', ARGV[1], 'registry_id', ARGV[2])
end
return redis.call('HMGET', KEYS[1], 'version', 'registry_id')
"""

# KEYS: revision, names. ARGV: prefix of adapter keys. Answers revision, then every adapter.
SNAPSHOT = """
local answer = {redis.call('GET', KEYS[1]) or '0'}
local names = redis.call('HGETALL', KEYS[2])
for i = 1, #names, 2 do
  if names[i] == names[i + 1] then
    answer[#answer + 1] = redis.call('GET', ARGV[1] .. names[i])
  end
end
return answer
"""

# KEYS: adapter.
GET = """
return redis.call('GET', KEYS[1])
"""

# KEYS: schema, revision, names, digests, changes, garbage, adapter, request (or schema again when there is none).
# ARGV: registry_id, kind, name, record ('' to delete), etag that must be found ('' for any), force, history,
#       fingerprint of the request ('' for none), seconds to remember it.
WRITE = """
local registry_id, kind, name, record, etag, force = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if redis.call('HGET', KEYS[1], 'registry_id') ~= registry_id then return {'OTHER_REGISTRY'} end
if ARGV[8] ~= '' then
  local answer = redis.call('HMGET', KEYS[8], 'fingerprint', 'kind', 'record', 'revision')
  if answer[1] == ARGV[8] then return {'REPEATED', answer[2], answer[3], answer[4]} end
  if answer[1] then return {'REQUEST_ID_REUSED'} end
end
local old = redis.call('GET', KEYS[7])
local before, after = {aliases = {}, versions = {}}, {aliases = {}, versions = {}}
if kind ~= 'added' then
  if not old then return {'NOT_FOUND'} end
  before = cjson.decode(old)
  if etag ~= '' and before.etag ~= etag then return {'ETAG_MISMATCH', before.etag} end
end
local taken = {}
if kind == 'deleted' then
  record = old
else
  after = cjson.decode(record)
  taken[1] = name
  for alias in pairs(after.aliases) do taken[#taken + 1] = alias end
  for _, key in ipairs(taken) do
    local owner = redis.call('HGET', KEYS[3], key)
    if owner and (owner ~= name or kind == 'added') then return {'TAKEN', key, owner} end
  end
end

local revision = redis.call('INCR', KEYS[2])
redis.call('HDEL', KEYS[3], name)
for alias in pairs(before.aliases) do redis.call('HDEL', KEYS[3], alias) end
for _, key in ipairs(taken) do redis.call('HSET', KEYS[3], key, name) end
for _, version in ipairs(after.versions) do redis.call('HINCRBY', KEYS[4], version.digest, 1) end
for _, version in ipairs(before.versions) do
  local digest = version.digest
  if redis.call('HINCRBY', KEYS[4], digest, -1) <= 0 then
    redis.call('HDEL', KEYS[4], digest)
    -- A registration of the same content that is under way keeps its claim.
    local garbage = cjson.decode(redis.call('HGET', KEYS[6], digest) or '{"until":0}')
    redis.call('HSET', KEYS[6], digest, cjson.encode({revision = revision, ['until'] = garbage['until']}))
  end
end
for _, version in ipairs(after.versions) do redis.call('HDEL', KEYS[6], version.digest) end
if kind == 'deleted' then redis.call('DEL', KEYS[7]) else redis.call('SET', KEYS[7], record) end
redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[7], revision .. '-0', 'kind', kind, 'record', record, 'force', force)
if ARGV[8] ~= '' then
  redis.call('HSET', KEYS[8], 'fingerprint', ARGV[8], 'kind', kind, 'record', record, 'revision', revision)
  redis.call('EXPIRE', KEYS[8], ARGV[9])
end
return {'WRITTEN', kind, record, tostring(revision)}
"""

# KEYS: request. Answers nothing, or fingerprint, kind, record, revision.
ANSWERED = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
return redis.call('HMGET', KEYS[1], 'fingerprint', 'kind', 'record', 'revision')
"""

# KEYS: schema, revision, changes. ARGV: registry_id, revision to start after, at most this many.
CHANGES = """
if redis.call('HGET', KEYS[1], 'registry_id') ~= ARGV[1] then return {'OTHER_REGISTRY'} end
local last, after = tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[2])
if after > last then return {'OUT_OF_RANGE', tostring(last)} end
local entries = redis.call('XRANGE', KEYS[3], (after + 1) .. '-0', '+', 'COUNT', ARGV[3])
if after < last and (#entries == 0 or entries[1][1] ~= (after + 1) .. '-0') then return {'OUT_OF_RANGE', tostring(last)} end
return {'OK', entries}
"""

# KEYS: garbage. ARGV: digest, seconds. Keeps an image from being deleted while it is being registered.
CLAIM = """
local now = tonumber(redis.call('TIME')[1])
local garbage = cjson.decode(redis.call('HGET', KEYS[1], ARGV[1]) or '{"revision":0,"until":0}')
if garbage.deleting and garbage['until'] > now then return {'DELETING'} end
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({revision = garbage.revision, ['until'] = now + tonumber(ARGV[2])}))
return {'CLAIMED'}
"""

# KEYS: garbage, digests. ARGV: digest. Gives a claim back: the image may be deleted at once if it has no name.
UNCLAIM = """
local found = redis.call('HGET', KEYS[1], ARGV[1])
if not found then return {'OK'} end
local garbage = cjson.decode(found)
if not garbage.deleting then
  redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({revision = garbage.revision, ['until'] = 0}))
end
return {'OK'}
"""

# KEYS: members, garbage. ARGV: member, seconds to live, revision seen, digests in use without a name...
# Answers the digests that may be garbage.
HEARTBEAT = """
local now = tonumber(redis.call('TIME')[1])
local draining = {}
for i = 4, #ARGV do draining[ARGV[i]] = true end
local member = {seen = tonumber(ARGV[3]), draining = draining, expires = now + tonumber(ARGV[2])}
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(member))
local answer = {}
local garbage = redis.call('HGETALL', KEYS[2])
for i = 1, #garbage, 2 do
  if cjson.decode(garbage[i + 1])['until'] <= now then answer[#answer + 1] = garbage[i] end
end
return answer
"""

# KEYS: members. ARGV: member.
LEAVE = """
return redis.call('HDEL', KEYS[1], ARGV[1])
"""

# KEYS: members, garbage, digests. ARGV: digest, seconds that the deletion may take.
COLLECT = """
local found = redis.call('HGET', KEYS[2], ARGV[1])
if not found then return {'KEEP'} end
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then
  redis.call('HDEL', KEYS[2], ARGV[1])
  return {'KEEP'}
end
local now = tonumber(redis.call('TIME')[1])
local garbage = cjson.decode(found)
if garbage['until'] > now then return {'KEEP'} end
local members = redis.call('HGETALL', KEYS[1])
for i = 1, #members, 2 do
  local member = cjson.decode(members[i + 1])
  if member.expires <= now then
    redis.call('HDEL', KEYS[1], members[i])
  elseif member.seen < garbage.revision or member.draining[ARGV[1]] then
    return {'KEEP'}
  end
end
garbage.deleting = true
garbage['until'] = now + tonumber(ARGV[2])
redis.call('HSET', KEYS[2], ARGV[1], cjson.encode(garbage))
return {'DELETE'}
"""

# KEYS: garbage. ARGV: digest. Ends what COLLECT began.
COLLECTED = """
local found = redis.call('HGET', KEYS[1], ARGV[1])
if found and cjson.decode(found).deleting then redis.call('HDEL', KEYS[1], ARGV[1]) end
return {'OK'}
"""
