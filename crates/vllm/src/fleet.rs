//! The dispatcher: which server generates which sample, and what becomes of its answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_engine::{Finished, GroupJob, Output};
use pacs_protocol::v1;
use pacs_weights::VersionId;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::answer::{Accepted, Model, accept, scores};
use crate::driver::{News, Shared};
use crate::queue::{Queue, Wanted};
use crate::seat::{Seat, State};
use crate::{Client, Drawing, Fault};

/// How often held servers are looked at again, and the status is renewed.
const TICK: Duration = Duration::from_millis(500);

/// What the dispatcher is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Forget all groups, and work for another registration. Registrations are numbered.
    Attach(mpsc::Sender<Output>, u64),
    /// Forget all groups of this registration, unless there is a later one.
    Detach(u64),
    /// Generate a group with this version or newer ones.
    Generate(GroupJob, VersionId),
    /// Forget a group.
    Cancel(u64),
}

/// A request that ended.
struct Answered {
    seat: usize,
    began: Instant,
    wanted: Wanted,
    result: Result<Accepted, Fault>,
}

/// What others read of the dispatcher.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) capacity: watch::Sender<usize>,
    pub(crate) serves: watch::Sender<Option<VersionId>>,
    pub(crate) servers: watch::Sender<Vec<v1::EngineServer>>,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            capacity: watch::Sender::new(0),
            serves: watch::Sender::new(None),
            servers: watch::Sender::new(Vec::new()),
        }
    }
}

pub(crate) struct Fleet {
    pub(crate) seats: Vec<Seat>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) model: Arc<Model>,
    pub(crate) board: Arc<Board>,
    /// Requests that one server is given at once.
    pub(crate) max_requests: usize,
    pub(crate) max_attempts: u32,
    queue: Queue,
    /// Requests that are not answered, and who has them.
    requests: JoinSet<Answered>,
    running: HashMap<(u64, u32), (usize, Wanted, AbortHandle)>,
    /// The server that got a group's last sample: it has the prompt's keys and values.
    favourites: HashMap<u64, usize>,
    outbox: Option<mpsc::Sender<Output>>,
    registration: u64,
}

impl Fleet {
    pub(crate) fn new(
        seats: Vec<Seat>,
        shared: Arc<Shared>,
        model: Arc<Model>,
        board: Arc<Board>,
        (max_requests, max_attempts): (usize, u32),
    ) -> Self {
        Self {
            seats,
            shared,
            model,
            board,
            max_requests,
            max_attempts,
            queue: Queue::default(),
            requests: JoinSet::new(),
            running: HashMap::new(),
            favourites: HashMap::new(),
            outbox: None,
            registration: 0,
        }
    }

    /// Works until nobody has anything to say any more.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut news: mpsc::Receiver<(usize, News)>,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => return,
                },
                Some((seat, news)) = news.recv() => self.hear(seat, news).await,
                Some(ended) = self.requests.join_next() => self.answered(ended).await,
                _ = tick.tick() => {}
            }
            self.dispatch();
            self.publish();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach(outbox, number) => {
                self.forget();
                (self.outbox, self.registration) = (Some(outbox), number);
            }
            Command::Detach(number) if number < self.registration => {}
            Command::Detach(_) => {
                self.forget();
                self.outbox = None;
            }
            Command::Generate(job, oldest) => self.queue.extend(Wanted::of(job, oldest)),
            Command::Cancel(ticket) => {
                self.queue.cancel(ticket);
                self.favourites.remove(&ticket);
                let keys: Vec<_> = self.running.keys().filter(|key| key.0 == ticket).copied().collect();
                for key in keys {
                    self.abort(key);
                }
                for seat in &mut self.seats {
                    seat.parked.retain(|(wanted, _)| wanted.group.ticket != ticket);
                }
            }
        }
    }

    /// Forgets all groups: nobody wants them any more.
    fn forget(&mut self) {
        self.queue.clear();
        self.favourites.clear();
        let keys: Vec<_> = self.running.keys().copied().collect();
        for key in keys {
            self.abort(key);
        }
        self.seats.iter_mut().for_each(|seat| seat.parked.clear());
    }

    /// Ends a request, which its server notices by the closed connection; returns its sample.
    fn abort(&mut self, key: (u64, u32)) -> Option<Wanted> {
        let (seat, wanted, handle) = self.running.remove(&key)?;
        handle.abort();
        self.seats[seat].in_flight.send_modify(|in_flight| *in_flight -= 1);
        Some(wanted)
    }

    async fn hear(&mut self, number: usize, news: News) {
        let seat = &mut self.seats[number];
        match news {
            News::Idle => seat.state = State::Idle,
            News::Updating(version) => seat.state = State::Updating(version),
            News::Ready(version, label) => {
                let parked = seat.verified(version, label);
                let before = *self.board.serves.borrow();
                if before.is_none_or(|before| before < version) {
                    self.board.serves.send_replace(Some(version));
                }
                for (wanted, accepted) in parked {
                    self.settle(number, wanted, accepted).await;
                }
            }
            News::Probed(error) => seat.probed(error),
            News::Load(load) => seat.loaded(load),
            News::Down(fault) => {
                seat.down(&fault);
                let parked = std::mem::take(&mut seat.parked);
                let theirs = self.running.iter().filter(|(_, (seat, ..))| *seat == number);
                let keys: Vec<_> = theirs.map(|(key, _)| *key).collect();
                let lost = Fault::Abandoned(fault.to_string());
                for wanted in keys.into_iter().filter_map(|key| self.abort(key)).collect::<Vec<_>>() {
                    self.retry(number, wanted, &lost).await;
                }
                let unverified =
                    Fault::UnknownVersion("the server was lost before its weights were verified".to_owned());
                for (wanted, _) in parked {
                    self.retry(number, wanted, &unverified).await;
                }
            }
            News::Wrong(problem) => self.say(Output::Refused(problem)).await,
        }
    }

    /// Gives samples to servers as long as some server has room.
    fn dispatch(&mut self) {
        let now = Instant::now();
        loop {
            let (seats, favourites, most) = (&self.seats, &self.favourites, self.max_requests);
            let some_room = seats.iter().any(|seat| seat.has_room(most, now));
            if !some_room {
                return;
            }
            let seat_for = |wanted: &Wanted| {
                let favourite = favourites.get(&wanted.group.ticket);
                let open = seats.iter().enumerate().filter(|(_, seat)| seat.takes(wanted.group.oldest, most, now));
                let (number, _) = open.min_by_key(|(number, seat)| {
                    (wanted.tried == Some(*number), favourite != Some(number), *seat.in_flight.borrow())
                })?;
                Some(number)
            };
            let Some((wanted, number)) = self.queue.take(seat_for) else { return };
            self.favourites.insert(wanted.group.ticket, number);
            self.start(number, wanted);
        }
    }

    fn start(&mut self, number: usize, wanted: Wanted) {
        let seat = &mut self.seats[number];
        seat.in_flight.send_modify(|in_flight| *in_flight += 1);
        let (client, label) = (seat.client.clone(), seat.label.clone());
        let (model, shared, sample) = (Arc::clone(&self.model), Arc::clone(&self.shared), wanted.clone());
        let began = Instant::now();
        let request = async move {
            let result = request(&client, &sample, &label, &model, &shared).await;
            Answered { seat: number, began, wanted: sample, result }
        };
        let handle = self.requests.spawn(request);
        self.running.insert(wanted.key(), (number, wanted, handle));
    }

    async fn answered(&mut self, ended: Result<Answered, tokio::task::JoinError>) {
        let Answered { seat: number, began, wanted, result } = match ended {
            Ok(answered) => answered,
            // An aborted request is accounted for by whoever aborted it.
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                let problem = format!("a request to a server panicked: {error}");
                return self.say(Output::Failed(problem)).await;
            }
        };
        // A request that ended while it was aborted.
        if self.running.remove(&wanted.key()).is_none() {
            return;
        }
        self.seats[number].in_flight.send_modify(|in_flight| *in_flight -= 1);
        self.seats[number].ended(result.as_ref().err(), began, Instant::now());
        match result {
            Ok(accepted) => self.settle(number, wanted, accepted).await,
            Err(fault) => {
                self.seats[number].failed(&fault, Instant::now());
                self.retry(number, wanted, &fault).await;
            }
        }
    }

    /// Hands a sample out, unless its weights are not verified yet or too old.
    async fn settle(&mut self, number: usize, wanted: Wanted, accepted: Accepted) {
        let oldest = accepted.versions.iter().min().copied();
        if let Some(found) = oldest.filter(|found| *found < wanted.group.oldest) {
            let fault = Fault::Stale { found: found.to_string(), wanted: wanted.group.oldest.to_string() };
            self.seats[number].failed(&fault, Instant::now());
            return self.retry(number, wanted, &fault).await;
        }
        let seat = &mut self.seats[number];
        if !seat.has_verified(&accepted) {
            return seat.parked.push((wanted, accepted));
        }
        seat.used();
        let (ticket, index) = wanted.key();
        tracing::debug!(lease = ticket, sample = index, server = seat.endpoint, "sample generated");
        self.say(Output::Finished(Box::new(Finished { ticket, index, sample: accepted.sample }))).await;
    }

    /// Has a sample generated again, or gives it up.
    async fn retry(&mut self, number: usize, mut wanted: Wanted, fault: &Fault) {
        let (ticket, index) = wanted.key();
        // A server that says that it is busy has not tried.
        wanted.attempts += u32::from(!matches!(fault, Fault::Busy(_)));
        wanted.tried = Some(number);
        let (server, attempts) = (&self.seats[number].endpoint, wanted.attempts);
        tracing::debug!(lease = ticket, sample = index, server, attempts, fault = fault.name(), "no sample: {fault}");
        if wanted.attempts < self.max_attempts {
            return self.queue.put_back(wanted);
        }
        let reason = format!("{attempts} servers tried in vain, {server} last: {fault}");
        self.say(Output::GivenUp { ticket, index, reason }).await;
    }

    async fn say(&mut self, output: Output) {
        let Some(outbox) = &self.outbox else { return };
        if outbox.send(output).await.is_err() {
            // The registration has ended, and its leases with it.
            self.outbox = None;
            self.forget();
        }
    }

    fn publish(&mut self) {
        let up = self.seats.iter().filter(|seat| seat.is_up()).count();
        let capacity = up.saturating_mul(self.max_requests);
        self.board.capacity.send_if_modified(|before| std::mem::replace(before, capacity) != capacity);
        let now = Instant::now();
        let servers: Vec<_> = self.seats.iter().map(|seat| seat.status(now)).collect();
        self.board.servers.send_if_modified(|before| {
            let changed = *before != servers;
            *before = servers;
            changed
        });
        // Tickets come to an end without a word when their last sample is handed out.
        if self.favourites.len() > 2 * (self.running.len() + 1024) {
            self.favourites.clear();
        }
    }
}

/// Has one sample generated by a server, and checks the answer.
async fn request(
    client: &Client,
    wanted: &Wanted,
    label: &str,
    model: &Model,
    shared: &Shared,
) -> Result<Accepted, Fault> {
    let (prompt, options) = (&wanted.group.prompt, &wanted.group.options);
    let drawing = Drawing {
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        min_p: options.min_p,
        seed: wanted.seed(),
        max_new_tokens: options.max_new_tokens,
        end_tokens: &model.end_tokens,
        stop: &options.stop,
    };
    let answer = client.generate(prompt, &drawing, label).await?;
    let mut accepted = accept(answer, prompt, options, model, &shared.installed)?;
    // Servers score at temperature 1 only. Samples of training are drawn at 1 where something is cut off, as the job's check
    // demands; those of an evaluation keep the log-probs of what they were drawn from.
    if options.cuts_off() && options.temperature == 1.0 {
        let tokens: Vec<u32> = prompt.iter().chain(&accepted.sample.tokens).copied().collect();
        let (logprobs, scored_by) = scores(client.score(&tokens, label).await?, &tokens, prompt.len())?;
        let version = shared.installed.version_of(&scored_by);
        match accepted.versions[..] {
            [one] if version == Some(one) => {}
            _ => {
                return Err(Fault::UnknownVersion(
                    "a sample was not scored by the version that generated it".to_owned(),
                ));
            }
        }
        accepted.sample.sampled_logprobs = std::mem::replace(&mut accepted.sample.logprobs, logprobs);
    }
    Ok(accepted)
}
