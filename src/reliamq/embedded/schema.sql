-- The broker in one file.  All times are wall-clock seconds of the one machine that has the file.
--
-- A topic is a log.  Its messages have the numbers topic.id * 2^40 + 1, + 2, …, so a range of `seq` is a piece of one
-- topic's log, without an index for it.  A group has a cursor in the log and one `delivery` row for each message behind
-- the cursor that it has not finished.  So publishing costs the same for any number of groups, a new group costs
-- nothing, and a backlog is the log itself: `delivery` stays as small as what is in flight or set aside.
--
-- A chain is the messages of one key behind a group's cursor.  What may be handed out is decided by `delivery.state`:
--   0 waiting  behind another one of its chain
--   1 ready    the chain's first (or without a key), to be handed out from `due_at` on
--   2 leased   handed out to `owner` under the number `claim`, until `due_at`; a chain has one owner at a time
--   3 apart    gave way: outside its chain until `due_at`, then in it again at its new position
--   4 behind   gave way, and the cursor has not yet passed its new position

CREATE TABLE topic (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  last INTEGER NOT NULL,               -- the highest seq that was ever given in this topic
  retention REAL NOT NULL,             -- seconds that a message is kept after every group has finished it
  max_message_bytes INTEGER NOT NULL
);

CREATE TABLE group_ (
  id INTEGER PRIMARY KEY,
  topic_id INTEGER NOT NULL REFERENCES topic (id),
  name TEXT NOT NULL,
  cursor INTEGER NOT NULL,             -- every seq up to here was handed out, set aside or was not for this group
  claims INTEGER NOT NULL DEFAULT 0,   -- grows with each hand-out: the fencing number of receipts
  members INTEGER NOT NULL DEFAULT 0,  -- grows with each subscription: the number of an owner
  UNIQUE (topic_id, name)
);

CREATE TABLE message (
  seq INTEGER PRIMARY KEY,
  topic_id INTEGER NOT NULL,
  size INTEGER NOT NULL,
  key BLOB,
  only_group TEXT,
  id TEXT NOT NULL,
  type TEXT NOT NULL,
  source TEXT NOT NULL,
  time TEXT NOT NULL,
  content_type TEXT NOT NULL,
  sequence INTEGER,
  headers TEXT,
  body BLOB NOT NULL                   -- last, so that reading the columns before it does not read it
);
CREATE UNIQUE INDEX message_identity ON message (topic_id, id);

CREATE TABLE delivery (
  group_id INTEGER NOT NULL,
  position INTEGER NOT NULL,           -- its place in the group's order: its seq, until it gives way
  seq INTEGER NOT NULL,
  chain BLOB,                          -- the message's key while it is in its chain
  state INTEGER NOT NULL,
  due_at REAL NOT NULL,
  owner INTEGER NOT NULL DEFAULT 0,
  claim INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  handed_out INTEGER NOT NULL DEFAULT 0, -- came back unsettled at least once
  begun INTEGER NOT NULL DEFAULT 0,      -- a start was recorded under this claim
  reason TEXT NOT NULL DEFAULT '',       -- why it was given back last
  PRIMARY KEY (group_id, position)
) WITHOUT ROWID;
CREATE INDEX delivery_chain ON delivery (group_id, chain, state, position, owner) WHERE chain IS NOT NULL;
CREATE INDEX delivery_due ON delivery (group_id, state, due_at, position);
CREATE INDEX delivery_behind ON delivery (group_id, position) WHERE state = 4;
CREATE INDEX delivery_moved ON delivery (seq) WHERE position <> seq;

-- "At this time every group had seen everything up to here."  Retention counts from there.
CREATE TABLE finished (
  topic_id INTEGER NOT NULL,
  at REAL NOT NULL,
  seq INTEGER NOT NULL,
  PRIMARY KEY (topic_id, at)
) WITHOUT ROWID;

CREATE TABLE dead_letter (
  number INTEGER PRIMARY KEY,
  topic TEXT NOT NULL,
  group_name TEXT NOT NULL,
  id TEXT NOT NULL,
  key BLOB,
  only_group TEXT,
  type TEXT NOT NULL,
  source TEXT NOT NULL,
  time TEXT NOT NULL,
  content_type TEXT NOT NULL,
  sequence INTEGER,
  headers TEXT,
  body BLOB NOT NULL,
  handler TEXT NOT NULL,
  reason TEXT NOT NULL,
  traceback TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  died_at TEXT NOT NULL,
  position TEXT NOT NULL,
  UNIQUE (topic, group_name, id)
);
CREATE INDEX dead_letter_id ON dead_letter (id);
