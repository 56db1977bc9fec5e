/* The hand-off of one sequence between two workers and their gateway, for spin. Checked by test_handoff_model.py.

   What stands for what in the code:
     W(0), the sender      common/protocol/handoff_sender.py, as the desk of its worker drives it (common/mesh/handoff_desk.py)
     W(1), the receiver    common/protocol/handoff_receiver.py, likewise
     floor                 common/protocol/attempt_floor.py
     on_dispatch, cancel   common/mesh/worker.py
     the list rule         HandoffDesk.held
     own, gen, content     common/policy/block_pool.py and the KV region: one block a worker
     the copy              the mapped tier (common/adapters/kv_copying.py): fence, bytes, fence; without the checksum, which would
                           hide a missing fence
     G                     common/mesh/gateway.py with common/protocol/token_stream.py; the replay is the probe
   Faults, each with a budget: CRASHES of a worker (it is back at once, as a new incarnation), BREAKS of the control connection,
   LOSSES and TWICE of the broker's messages, WATCHDOGS that take a live worker for lost, REUSES of freed blocks by other
   requests. Timers fire at any time. The client may LEAVE.

   Variants with one rule taken out must fail: NO_GENERATION_CHECK, NO_ATTEMPT_FILTER, NO_RIGHT_TO_EMIT, NO_TOMBSTONE and
   NO_LANDING_WAIT. Left out: n > 1, preemption, several chunks, prefix pins, suspects, gateways that die. */

#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef BREAKS
#define BREAKS 0
#endif
#ifndef LOSSES
#define LOSSES 0
#endif
#ifndef TWICE
#define TWICE 0
#endif
#ifndef WATCHDOGS
#define WATCHDOGS 0
#endif
#ifndef REUSES
#define REUSES 1
#endif
#define TOKENS 2               /* token 0 is the sender's, token 1 the receiver's */
#define ATTEMPTS 8             /* more than the faults can cause: an assertion shows that it is never reached */
#define P 0
#define D 1

/* states of the sequence at a worker */
#define NONE 0
#define QUEUED_HERE 1          /* dispatched, no blocks yet */
#define OFFERED 2
#define BUSY_THERE 3
#define ACCEPTED 4
#define LAST_SENT 5
#define MOVED 6                /* handed over: only the log is left */
#define RUNNING 7
#define WAITS 8                /* receiver: no room yet */
#define RESERVED 9
#define COMPLETING 10
#define ENDED 11               /* only the log is left */
#define BEFORE_LAST(x) ((x) >= OFFERED && (x) <= ACCEPTED)
#define RECEIVES(x) ((x) >= WAITS && (x) <= COMPLETING)
/* a block */
#define FREE 0                 /* or cache: its content stays until somebody takes it */
#define OURS 1
#define FOREIGN 2              /* another request's */
#define LANDING 3              /* released, and a copy into it still runs */
#define JUNK 0
#define GOOD 1
/* what the receiver knows of the announced block */
#define NOTHING 0
#define READY_CAME 1
#define COPIED 2
#define FAILED 3               /* computed here instead */
/* the gateway */
#define PLACE 0
#define FOLLOW 1
#define OVER 2

mtype = { DISPATCH, CANCEL, OFFER, ACCEPT, BUSY, REFUSE, READY, LAST, ACK, WITHDRAW }

typedef Worker { byte state, attempt, made, floor, number, reservation, block, copying, fence, source; bool hand_off }
Worker w[2];
byte own[2], content[2], gen[2];
byte old_content, old_gen, life, linked;         /* the sender's region of its last life stays readable; `linked`: the life that the link reads */
byte link;                                       /* 0: whole; else bit 2: broken, bits 0 and 1: P, D have not noticed */
chan inbox[2] = [4] of { mtype, byte, byte, bool };
chan control[2] = [6] of { mtype, byte, byte, byte, byte };   /* to P, to D: attempt, number, reservation, tokens or generation */
chan frames[2] = [TOKENS] of { byte, byte };
byte offers, reservations;
byte stage = PLACE, attempt = 0, next, asks;
byte given[ATTEMPTS];
byte crashes, breaks, losses, twice, watchdogs, reuses;
byte told[2], endings;                           /* ghosts: the highest attempt whose cancel was handled; ends seen by the client */

#define OTHER (1 - me)
#define TO_PEER(m, a, no, r, x) if :: link == 0 -> assert(nfull(control[OTHER])); control[OTHER]!m, a, no, r, x :: else fi
#define PUBLISH(v, m, a, x, h) if :: nfull(inbox[v]) -> inbox[v]!m, a, x, h \
  :: losses < LOSSES -> losses++ \
  :: twice < TWICE && len(inbox[v]) < 3 -> twice++; inbox[v]!m, a, x, h; inbox[v]!m, a, x, h fi

/* ---------------------------------------------------------------- workers */
inline forget() {                                /* the sequence is gone, its log too */
  if
  :: own[me] == OURS ->
#ifdef NO_LANDING_WAIT
     own[me] = FREE
#else
     own[me] = (w[me].copying -> LANDING : FREE)
#endif
  :: else
  fi;
  w[me].state = NONE; w[me].attempt = 0; w[me].made = 0; w[me].number = 0; w[me].reservation = 0; w[me].block = NOTHING;
  w[me].hand_off = false
}
inline close(how) { own[me] = FREE; w[me].state = how; w[me].number = 0; w[me].reservation = 0; w[me].block = NOTHING }
inline give_up() {                               /* cancelled or replaced: the other side is told */
  if
  :: BEFORE_LAST(w[me].state) -> TO_PEER(WITHDRAW, w[me].attempt, w[me].number, 0, 0)
  :: w[me].state == LAST_SENT || w[me].state == MOVED -> TO_PEER(CANCEL, w[me].attempt, 0, 0, 0)
  :: RECEIVES(w[me].state) -> TO_PEER(REFUSE, w[me].attempt, w[me].number, 0, 0)
  :: else
  fi;
  forget()
}
inline cancel(a) {
  if :: told[me] < a -> told[me] = a :: else fi;
#ifndef NO_TOMBSTONE
  if :: w[me].floor <= a -> w[me].floor = a + 1 :: else fi;
#endif
  if
  :: w[me].state != NONE && w[me].attempt <= a ->
     if :: w[me].state == ENDED -> skip :: else -> give_up() fi
  :: else
  fi
}
inline admit(a) {
  if :: w[me].state != NONE -> give_up() :: else fi;
  if :: w[me].floor < a -> w[me].floor = a :: else fi;
  w[me].attempt = a
}
#define LIVE (stage == FOLLOW && w[me].attempt == attempt)
#define MAY_EMIT(v) (w[v].state == RUNNING || BEFORE_LAST(w[v].state))
inline emit() {
  assert(own[me] == OURS && content[me] == GOOD);                        /* uses only its own, right blocks */
  assert(told[me] < w[me].attempt);                                      /* nothing after its cancel was handled here */
  assert(!(MAY_EMIT(OTHER) && w[OTHER].attempt == w[me].attempt));       /* one has the right to emit */
  if
#ifndef NO_ATTEMPT_FILTER
  :: !LIVE -> skip                                                       /* would be dropped: not sent, to keep the model small */
#endif
  :: else -> if :: frames[me]!w[me].attempt, w[me].made :: losses < LOSSES -> losses++ fi
  fi;
  w[me].made++
}
inline on_inbox() {
  inbox[me]?m, a, x, h;
  if
  :: m == CANCEL -> cancel(a)
  :: m == DISPATCH ->
     if
     :: a < w[me].floor || (w[me].state != NONE && w[me].attempt >= a) -> skip     /* stale, or known */
     :: else -> admit(a); w[me].state = QUEUED_HERE; w[me].made = x; w[me].hand_off = h
     fi
  fi
}
inline lost_peer() {                             /* also where the peer does not list the sequence */
  if
  :: BEFORE_LAST(w[me].state) -> w[me].state = RUNNING
  :: w[me].state == LAST_SENT ->
#ifdef NO_RIGHT_TO_EMIT
     w[me].state = RUNNING
#else
     close(MOVED)
#endif
  :: w[me].state == WAITS || w[me].state == RESERVED -> forget()
  :: else
  fi
}
inline on_sender_message() {                     /* in the receiver */
  control[D]?m, a, no, r, x;
  if
  :: m == CANCEL -> cancel(a)
  :: m == OFFER ->
     if
     :: a < w[D].floor || (w[D].state != NONE && w[D].state != MOVED && w[D].state != ENDED && w[D].attempt >= a) ->
        TO_PEER(REFUSE, a, no, 0, 0)
     :: else ->
        admit(a); w[D].number = no; w[D].made = x; w[D].state = WAITS;
        if :: own[D] == FREE -> reserve() :: else -> TO_PEER(BUSY, a, no, 0, 0) fi
     fi
  :: m == READY || m == LAST || m == WITHDRAW ->
     if
     :: !RECEIVES(w[D].state) || w[D].attempt != a || w[D].number != no ->
        if :: m == WITHDRAW -> skip :: else -> TO_PEER(REFUSE, a, no, 0, 0) fi
     :: else ->
        if
        :: m == WITHDRAW -> forget()
        :: m == READY && w[D].state == RESERVED && w[D].reservation == r ->
           w[D].block = READY_CAME; w[D].fence = x; w[D].source = linked
        :: m == LAST && w[D].state == RESERVED && w[D].reservation == r -> w[D].made = x; w[D].state = COMPLETING
        :: else -> TO_PEER(REFUSE, a, no, 0, 0)
        fi
     fi
  fi
}
inline reserve() {
  own[D] = OURS; gen[D]++; content[D] = JUNK; reservations++;
  w[D].state = RESERVED; w[D].reservation = reservations;
  TO_PEER(ACCEPT, w[D].attempt, w[D].number, reservations, 0)
}
inline on_receiver_message() {                   /* in the sender */
  control[P]?m, a, no, r, x;
  if
  :: w[P].attempt != a || w[P].state < OFFERED || w[P].state > LAST_SENT ->
     if :: m == CANCEL -> cancel(a) :: else fi
  :: else ->
     if
     :: m == CANCEL -> cancel(a)
     :: m == ACCEPT && w[P].number == no && (w[P].state == OFFERED || w[P].state == BUSY_THERE) ->
        w[P].state = ACCEPTED; w[P].reservation = r; TO_PEER(READY, a, no, r, gen[P])
     :: m == BUSY && w[P].number == no && w[P].state == OFFERED -> w[P].state = BUSY_THERE
     :: m == REFUSE && w[P].number == no -> forget()
     :: m == ACK && w[P].state == LAST_SENT && w[P].reservation == r -> close(MOVED)
     :: else
     fi
  fi
}
#define SOURCE_GEN (w[D].source == life -> gen[P] : old_gen)
#define SOURCE_CONTENT (w[D].source == life -> content[P] : old_content)
#define READABLE (w[D].source == life || w[D].source + 1 == life)
#ifdef NO_GENERATION_CHECK
#define FENCE_HOLDS true
#else
#define FENCE_HOLDS (READABLE && SOURCE_GEN == w[D].fence)
#endif
#define ALL_READ (empty(control[P]) && empty(control[D]))
#define PAIRED (w[P].attempt == w[D].attempt && w[P].number == w[D].number && w[P].state >= OFFERED && w[P].state <= LAST_SENT && RECEIVES(w[D].state))
#define DONE m = 0; a = 0; no = 0; r = 0; x = 0; h = false

proctype W(byte me) {
  mtype m; byte a, no, r, x; bool h;
end:
  do
  :: atomic { nempty(inbox[me]) -> on_inbox(); DONE }
  :: atomic { me == P && nempty(control[P]) -> on_receiver_message(); DONE }
  :: atomic { me == D && nempty(control[D]) -> on_sender_message(); DONE }
  :: atomic { (link >> me) & 1 ->                                       /* what was still under way is lost */
       do :: control[me]?m, a, no, r, x :: empty(control[me]) -> break od;
       link = link & (7 - (1 << me)); lost_peer(); DONE }
  /* the list rule */
  :: atomic { link == 0 && ALL_READ && !PAIRED && ((w[me].state >= OFFERED && w[me].state <= LAST_SENT) || w[me].state == WAITS || w[me].state == RESERVED) ->
       lost_peer() }
  /* the prompt is computed, or found in the cache; the offer goes with the first sealed chunk */
  :: atomic { w[me].state == QUEUED_HERE && own[me] == FREE && empty(frames[me]) ->
       own[me] = OURS;
       if :: content[me] == GOOD -> skip :: else -> gen[me]++; content[me] = GOOD fi;
       if
       :: w[me].hand_off && link == 0 ->
          offers++; w[me].number = offers; w[me].state = OFFERED; TO_PEER(OFFER, w[me].attempt, offers, 0, w[me].made)
       :: else -> w[me].state = RUNNING
       fi }
  :: atomic { BEFORE_LAST(w[me].state) && w[me].made == given[w[me].attempt] && nfull(frames[me]) ->
       emit();
       if :: w[me].made == TOKENS -> TO_PEER(WITHDRAW, w[me].attempt, w[me].number, 0, 0); close(ENDED) :: else fi }
  :: atomic { (w[me].state == OFFERED || w[me].state == BUSY_THERE) ->  /* its patience is over */
       TO_PEER(WITHDRAW, w[me].attempt, w[me].number, 0, 0); w[me].state = RUNNING }
  :: atomic { w[me].state == ACCEPTED && w[me].made > given[w[me].attempt] ->
       TO_PEER(LAST, w[me].attempt, w[me].number, w[me].reservation, w[me].made); w[me].state = LAST_SENT }
  /* the receiver */
  :: atomic { w[me].state == WAITS && own[me] == FREE -> reserve() }
  :: atomic { (w[me].state == RESERVED || w[me].state == COMPLETING) && w[me].block == READY_CAME && w[me].copying == 0 ->
       if :: FENCE_HOLDS -> w[me].copying = 1 :: else -> w[me].block = FAILED fi }
  :: atomic { w[me].copying == 1 ->
       assert(own[me] == OURS || own[me] == LANDING);                    /* writes only into what it holds */
       content[me] = SOURCE_CONTENT; w[me].copying = 2 }
  :: atomic { w[me].copying == 2 ->
       w[me].copying = 0;
       if
       :: own[me] == LANDING -> own[me] = FREE; content[me] = JUNK
       :: else -> if :: FENCE_HOLDS -> w[me].block = COPIED :: else -> w[me].block = FAILED fi
       fi }
  :: atomic { w[me].state == COMPLETING && w[me].copying == 0 && (w[me].block == COPIED || w[me].block == FAILED || w[me].block == NOTHING) ->
       if :: w[me].block != COPIED -> content[me] = GOOD :: else fi;     /* what cannot be used is computed here */
       TO_PEER(ACK, w[me].attempt, w[me].number, w[me].reservation, 0); w[me].state = RUNNING; w[me].block = NOTHING }
  /* decoding */
  :: atomic { w[me].state == RUNNING && w[me].made < TOKENS && nfull(frames[me]) -> emit() }
  :: atomic { w[me].state == RUNNING && w[me].made == TOKENS -> close(ENDED) }
  od
}
/* ---------------------------------------------------------------- what goes wrong, and the rest of the pool */
inline break_link() { link = 7 }
inline crash(v) {                                /* back at once, with nothing */
  crashes++;
  if :: v == P -> old_content = content[P]; old_gen = gen[P]; life++ :: else fi;
  w[v].state = NONE; w[v].attempt = 0; w[v].made = 0; w[v].floor = 0; w[v].number = 0; w[v].reservation = 0; w[v].block = NOTHING;
  w[v].copying = 0; w[v].fence = 0; w[v].source = 0; w[v].hand_off = false;
  own[v] = FREE; content[v] = JUNK; gen[v] = 0; told[v] = 0;
  do :: inbox[v]?_, _, _, _ :: empty(inbox[v]) -> break od;
  do :: control[v]?_, _, _, _, _ :: empty(control[v]) -> break od;
  link = (link | 4 | (1 << (1 - v))) & (7 - (1 << v))
}
active proctype Faults() {
end:
  do
  :: atomic { crashes < CRASHES && stage != OVER -> crash(P) }
  :: atomic { crashes < CRASHES && stage != OVER -> crash(D) }
  :: atomic { breaks < BREAKS && link == 0 -> breaks++; break_link() }
  :: atomic { link == 4 -> link = 0; linked = life }
  :: atomic { reuses < REUSES && own[P] == FREE -> reuses++; own[P] = FOREIGN; gen[P]++; content[P] = JUNK }
  :: atomic { reuses < REUSES && own[D] == FREE -> reuses++; own[D] = FOREIGN; gen[D]++; content[D] = JUNK }
  :: atomic { own[P] == FOREIGN -> own[P] = FREE }
  :: atomic { own[D] == FOREIGN -> own[D] = FREE }
  od
}
/* ---------------------------------------------------------------- the gateway */
inline dispatch(v, h) {
  attempt++; assert(attempt < ATTEMPTS);
  given[attempt] = next; asks = v; stage = FOLLOW; PUBLISH(v, DISPATCH, attempt, next, h)
}
inline end_request() { endings++; assert(endings == 1); stage = OVER }
inline raise() { PUBLISH(P, CANCEL, attempt, 0, false); PUBLISH(D, CANCEL, attempt, 0, false); stage = PLACE }
inline deliver(a) {
  assert(a == attempt && stage == FOLLOW);                               /* nothing of a dead attempt reaches the client */
  next++;
  if :: next == TOKENS -> end_request() :: else fi
}
#ifdef NO_ATTEMPT_FILTER
#define TAKES(a) (stage == FOLLOW)
#else
#define TAKES(a) (stage == FOLLOW && a == attempt)
#endif
#define KNOWN (w[asks].state != NONE && w[asks].attempt == attempt)
#define TAKE_FRAME(v) atomic { nempty(frames[v]) -> frames[v]?a, i; \
  if :: TAKES(a) && i == next -> asks = v; deliver(a) :: else fi; a = 0; i = 0 }

active proctype G() {
  byte a, i;
  atomic { run W(P); run W(D) }
  do
  :: atomic { stage == PLACE ->
       if :: dispatch(P, true) :: attempt > 0 -> dispatch(P, false) :: attempt > 0 -> dispatch(D, false) fi }
  :: TAKE_FRAME(P)
  :: TAKE_FRAME(D)
  /* a probe, once the dispatch was answered or given up: it comes after what was sent to the worker before */
  :: atomic { stage == FOLLOW && empty(inbox[asks]) && KNOWN && empty(frames[asks]) && w[asks].made > next -> deliver(attempt) }
  :: atomic { stage == FOLLOW && empty(inbox[asks]) && KNOWN && (w[asks].state == LAST_SENT || w[asks].state == MOVED) && w[asks].made <= next ->
       asks = 1 - asks }
  :: atomic { stage == FOLLOW && empty(inbox[asks]) && !KNOWN -> raise() }
  :: atomic { stage == FOLLOW && watchdogs < WATCHDOGS -> watchdogs++; raise() }
#ifdef LEAVE
  :: atomic { stage == FOLLOW -> PUBLISH(P, CANCEL, attempt, 0, false); PUBLISH(D, CANCEL, attempt, 0, false); end_request() }
#endif
  :: atomic { stage == OVER && timeout ->
       assert(endings == 1);                                             /* exactly one end */
       assert(own[P] == FREE && own[D] == FREE && w[D].copying == 0);    /* no block leaks */
       assert(w[P].state == NONE || w[P].state == MOVED || w[P].state == ENDED);
       assert(w[D].state == NONE || w[D].state == MOVED || w[D].state == ENDED);
       break }
  od
}
