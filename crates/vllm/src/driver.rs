//! One server: bringing it new weights, verifying what it holds, and watching it.

use std::sync::Arc;
use std::time::Duration;

use pacs_runtime::Backoff;
use pacs_shape::LM_HEAD;
use pacs_weights::{Description, Probe, VersionId};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::answer::scores;
use crate::checksums::{FleetSums, Sums};
use crate::client::Load;
use crate::folder::VersionFolder;
use crate::installed::Installed;
use crate::label;
use crate::probe::{Comparison, Judgement, Record};
use crate::wake::Wake;
use crate::{Client, Fault};

/// Looks in a row that may fail: a server is slow under load.
const MISSED_LOOKS: u32 = 2;
/// First wait before a server that cannot be used is tried again.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Intervals and deadlines that no job sets. Tests take shorter ones.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Longest time for a question that costs a server nothing.
    pub question: Duration,
    /// Longest time for the token by which a server shows that it generates, before it is given requests.
    pub first_token: Duration,
    /// How often a server is looked at while it serves.
    pub look: Duration,
    /// Longest wait before a server that cannot be used is tried again.
    pub longest_wait: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            question: Duration::from_secs(30),
            // On CPUs an engine compiles for half a minute when its first request comes.
            first_token: Duration::from_secs(120),
            look: Duration::from_secs(2),
            longest_wait: Duration::from_secs(15),
        }
    }
}

/// A version that servers can load.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) description: Description,
    pub(crate) label: String,
    pub(crate) folder: VersionFolder,
    /// The learner's scores of one sequence; `None` for a version that no step has made.
    pub(crate) probe: Option<Arc<Probe>>,
}

impl Prepared {
    pub(crate) fn id(&self) -> VersionId {
        self.description.id()
    }

    /// The version that `probe` compares this one with.
    fn before(&self, probe: &Probe) -> VersionId {
        VersionId { version: probe.previous(), ..self.id() }
    }
}

/// What the job needs of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Tokens of the longest prompt and answer.
    pub(crate) longest: u64,
    /// Where the first list of the model's longrope ends; `None` without a longrope.
    pub(crate) short_positions: Option<u64>,
    /// Log-probs after temperature, top-k, top-p and min-p.
    pub(crate) processed_logprobs: bool,
    /// No request may see two versions: its log-probs before the cut are scored after its end.
    pub(crate) drained_updates: bool,
    pub(crate) checksums: bool,
    pub(crate) max_probe_error: f64,
    /// Whether the model's output head is its embedding.
    pub(crate) tied: bool,
    /// Whether versions bring the head of a tied model as a tensor of its own.
    pub(crate) untied_head: bool,
    /// Longest wait for requests to end before an update.
    pub(crate) drain: Duration,
}

impl Needs {
    /// Why a server with sequences of up to `most` tokens rotates otherwise than the learner: vLLM takes the long factors of a longrope
    /// for all sequences where `max_model_len` is beyond the short ones, and a job where its own sequences are.
    fn other_factors(&self, most: u64) -> Option<String> {
        let end = self.short_positions.filter(|end| self.longest <= *end && *end < most)?;
        let longest = self.longest;
        let lower = if longest == end { "lower `data.max_prompt_tokens` by 1, and " } else { "" };
        Some(format!(
            "its longest sequence is {most} tokens, so it rotates all sequences by the model's `long_factor`, and this job, whose sequences \
             take {longest} at most, by `short_factor`: {lower}start it with --max-model-len {end}"
        ))
    }
}

/// What the drivers of all servers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) run: String,
    pub(crate) timing: Timing,
    pub(crate) needs: Needs,
    pub(crate) installed: Installed,
    pub(crate) sums: FleetSums,
}

/// What a driver tells the dispatcher.
#[derive(Debug)]
pub(crate) enum News {
    /// The server is there; there is nothing to give it yet.
    Idle,
    /// It is given a version. It gets no requests until it is ready again.
    Updating(VersionId),
    /// It serves a version, which is verified.
    Ready(VersionId, String),
    /// How far its log-probs of a probe are from the learner's (nats per token).
    Probed(f64),
    /// Its own metrics.
    Load(Load),
    /// It cannot be used for now.
    Down(Fault),
    /// What servers compute with is not what was published: no server may generate any more.
    Wrong(String),
}

/// Why work with a server ended.
enum Stop {
    /// It is tried again.
    Fault(Fault),
    /// The run cannot continue.
    Wrong(String),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

fn ended(_: watch::error::RecvError) -> Fault {
    Fault::Abandoned("the engine ended".to_owned())
}

/// Drives one server.
pub(crate) struct Driver {
    pub(crate) seat: usize,
    pub(crate) endpoint: String,
    pub(crate) client: Client,
    pub(crate) shared: Arc<Shared>,
    pub(crate) target: watch::Receiver<Option<Arc<Prepared>>>,
    /// The dispatcher takes everything at once, so a full queue waits for a moment only.
    pub(crate) news: mpsc::Sender<(usize, News)>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) in_flight: watch::Receiver<usize>,
    /// The version that the server serves, verified.
    pub(crate) held: Option<Arc<Prepared>>,
    /// Checksums of the version that was verified on this server last, whatever it holds now.
    pub(crate) sums: Option<(Description, Sums)>,
    /// What its log-probs were like on verified versions, whatever it holds now.
    pub(crate) record: Record,
}

impl Driver {
    /// Drives the server until the dispatcher is gone.
    pub(crate) async fn run(mut self) {
        let mut backoff = self.fresh_backoff();
        let mut told = None;
        loop {
            match self.session(&mut backoff).await {
                Stop::Fault(fault) => {
                    // A server that was there meanwhile is worth another line.
                    if self.held.take().is_some() || told.as_ref() != Some(&fault) {
                        tracing::warn!(server = self.endpoint, fault = fault.name(), "server is down: {fault}");
                    }
                    told = Some(fault.clone());
                    if !self.tell(News::Down(fault)).await {
                        return;
                    }
                    sleep(backoff.wait()).await;
                }
                Stop::Wrong(problem) => {
                    self.tell(News::Wrong(problem)).await;
                    return;
                }
            }
        }
    }

    fn fresh_backoff(&self) -> Backoff {
        let longest = self.shared.timing.longest_wait;
        Backoff::new(FIRST_WAIT.min(longest), longest)
    }

    /// False when nobody listens any more.
    async fn tell(&self, news: News) -> bool {
        self.news.send((self.seat, news)).await.is_ok()
    }

    async fn session(&mut self, backoff: &mut Backoff) -> Stop {
        match self.serve(backoff).await {
            Ok(never) => match never {},
            Err(stop) => stop,
        }
    }

    async fn serve(&mut self, backoff: &mut Backoff) -> Result<std::convert::Infallible, Stop> {
        self.inspect().await?;
        self.tell(News::Idle).await;
        let mut generates = false;
        loop {
            let wanted = self.target.borrow_and_update().clone();
            let Some(wanted) = wanted else {
                self.look_while_idle().await?;
                continue;
            };
            let label = self.client.weight_label().await?;
            if label == wanted.label {
                // An earlier start of this worker gave it, and was perhaps killed before it let the server continue.
                if self.client.is_paused().await? {
                    self.client.resume().await?;
                }
                self.held = Some(Arc::clone(&wanted));
            } else {
                if label::is_of_another_run(&self.shared.run, &label) {
                    tracing::warn!(server = self.endpoint, label, "the server has weights of another run");
                }
                if !label::is_of_a_run(&label) {
                    self.record.restarted();
                }
                self.update(&wanted).await?;
            }
            if !generates {
                // All that it will be asked for: what it answers only in part would take requests, lose them, and come back for more.
                self.client.first_token(&wanted.label, self.shared.timing.first_token).await?;
                let load = self.client.load().await?;
                self.tell(News::Load(load)).await;
                generates = true;
            }
            // What spoke against it was before this.
            self.wake.accused();
            self.tell(News::Ready(wanted.id(), wanted.label.clone())).await;
            *backoff = self.fresh_backoff();
            self.watch(&wanted).await?;
        }
    }

    /// Refuses a server that this job cannot use.
    async fn inspect(&self) -> Result<(), Fault> {
        let facts = self.client.facts().await?;
        let needs = &self.shared.needs;
        if let Some(most) = facts.max_model_len.filter(|most| *most <= needs.longest) {
            let longest = needs.longest;
            return Err(Fault::Unfit(format!(
                "its longest sequence is {most} tokens, and those of this job take {longest} and one more: start it with \
                 --max-model-len {}",
                longest + 1
            )));
        }
        if let Some(problem) = facts.max_model_len.and_then(|most| needs.other_factors(most)) {
            return Err(Fault::Unfit(problem));
        }
        let mode = facts.logprobs_mode.as_deref().unwrap_or("unknown");
        let fits = match needs.processed_logprobs {
            true => mode == "processed_logprobs",
            false => matches!(mode, "raw_logprobs" | "processed_logprobs"),
        };
        if !fits {
            return Err(Fault::Unfit(format!(
                "its log-probs are {mode}, and the sampling of this job needs those after it: start it with --logprobs-mode \
                 processed_logprobs"
            )));
        }
        if needs.tied && (needs.checksums || facts.is_on_cpu) {
            self.check_head(facts.is_on_cpu).await?;
        }
        tracing::info!(server = self.endpoint, vllm = facts.version, "server reached");
        Ok(())
    }

    /// Refuses a server whose output head would stay as it was at its start: neither its checksums nor a small change of log-probs would
    /// show that.
    async fn check_head(&self, is_on_cpu: bool) -> Result<(), Fault> {
        let has_head = self.client.checksums().await?.keys().any(|name| name.ends_with(LM_HEAD));
        let problem = match (has_head, self.shared.needs.untied_head) {
            (true, false) => {
                "it has an output head of its own, which versions of a model with tied embeddings do not bring: set \
                 `rollout.vllm.untied_head` = true"
            }
            (false, _) if is_on_cpu => {
                "it runs on a CPU, where vLLM keeps the output head of a tied model as it was at its start: start it from a folder \
                 written by `pacs model untie`, and set `rollout.vllm.untied_head` = true"
            }
            _ => return Ok(()),
        };
        Err(Fault::Unfit(problem.to_owned()))
    }

    async fn look_while_idle(&mut self) -> Result<(), Fault> {
        tokio::select! {
            changed = self.target.changed() => return changed.map_err(ended),
            () = sleep(self.shared.timing.look) => {}
        }
        self.client.weight_label().await.map(drop)
    }

    /// Gives the server a version, and verifies it there.
    async fn update(&mut self, wanted: &Arc<Prepared>) -> Result<(), Stop> {
        let (id, started) = (wanted.id(), std::time::Instant::now());
        self.tell(News::Updating(id)).await;
        self.probe_before(wanted).await?;
        if self.shared.needs.drained_updates {
            let drained = timeout(self.shared.needs.drain, self.in_flight.wait_for(|in_flight| *in_flight == 0)).await;
            if drained.is_err() {
                let seconds = self.shared.needs.drain.as_secs();
                return Err(Fault::Late { call: "the requests before an update", seconds }.into());
            }
        }
        self.held = None;
        let (updating, unverified) = (label::of_update(&self.shared.run), label::unverified(&wanted.label));
        self.client.pause().await?;
        // First, so that no token that is generated in the middle of an update carries the name of a version.
        self.client.set_weight_label(&updating).await?;
        self.client.reload_weights(&wanted.folder.servers_path).await?;
        self.client.set_weight_label(&unverified).await?;
        let found = self.client.weight_label().await?;
        if found != unverified {
            return Err(Fault::OtherWeights(format!("{found:?} instead of {id}")).into());
        }
        self.client.resume().await?;
        let paused = started.elapsed();
        // Requests continue meanwhile; their samples wait for the end of the verification.
        let sums = self.check_sums(wanted).await?;
        self.check_probe(wanted).await?;
        self.client.set_weight_label(&wanted.label).await?;
        self.held = Some(Arc::clone(wanted));
        if let Some(sums) = sums {
            self.sums = Some((wanted.description.clone(), sums));
        }
        tracing::debug!(
            server = self.endpoint,
            generation = id.generation.0,
            version = id.version.0,
            paused_seconds = paused.as_secs_f64(),
            seconds = started.elapsed().as_secs_f64(),
            "server has new weights"
        );
        Ok(())
    }

    /// Has a server that still serves the version before score the probe of `wanted`: its error there is its noise on these tokens.
    async fn probe_before(&mut self, wanted: &Prepared) -> Result<(), Fault> {
        let (Some(probe), Some(held)) = (&wanted.probe, &self.held) else { return Ok(()) };
        // What was not probed itself is a yardstick only as long as there is none better, as the first version is.
        let is_verified = held.probe.is_some() || self.record.is_empty();
        if held.id() != wanted.before(probe) || !is_verified {
            return Ok(());
        }
        let scored = self.score(probe, held.id(), &held.label).await?;
        self.record.note_before(probe, &scored);
        Ok(())
    }

    /// Log-probs of a probe's answer under a version that the server should have.
    async fn score(&self, probe: &Probe, id: VersionId, label: &str) -> Result<Vec<f32>, Fault> {
        let answer = self.client.score(probe.tokens(), label).await?;
        let (logprobs, found) = scores(answer, probe.tokens(), probe.answer_from())?;
        match found == label {
            true => Ok(logprobs),
            false => Err(Fault::OtherWeights(format!("{found:?} scored instead of {id}"))),
        }
    }

    async fn check_sums(&self, wanted: &Prepared) -> Result<Option<Sums>, Fault> {
        if !self.shared.needs.checksums {
            return Ok(None);
        }
        let sums = Sums::of(&self.client.checksums().await?);
        let hint = "set `rollout.vllm.checksums` = false if that is expected";
        if let Some((before, sums_before)) = &self.sums
            && before.digest() != wanted.description.digest()
            && sums_before.content == sums.content
        {
            let (before, now) = (before.id(), wanted.id());
            return Err(Fault::OtherWeights(format!("its checksums of {now} are those of {before}; {hint}")));
        }
        if !self.shared.sums.agree(&wanted.label, &sums) {
            let now = wanted.id();
            return Err(Fault::OtherWeights(format!(
                "its checksums of {now} are not those of another server that is divided alike; {hint}"
            )));
        }
        Ok(Some(sums))
    }

    /// Compares the server's log-probs of the probe with the learner's under this version and under the one before.
    async fn check_probe(&mut self, wanted: &Prepared) -> Result<(), Stop> {
        let Some(probe) = &wanted.probe else { return Ok(()) };
        let (before, id) = (wanted.before(probe), wanted.id());
        let scored = self.score(probe, id, &label::unverified(&wanted.label)).await?;
        let seen = Comparison::new(probe, &scored);
        let Comparison { error, from_previous, change, tokens, .. } = seen;
        let (noise, most) = (self.record.noise(&seen), self.shared.needs.max_probe_error);
        tracing::debug!(
            server = self.endpoint,
            from = %before,
            to = %id,
            error,
            from_previous,
            change,
            noise,
            tokens,
            "probe scored"
        );
        self.tell(News::Probed(error)).await;
        match self.record.judge(id, &seen, most) {
            Judgement::Fits => {
                self.record.note(&seen);
                Ok(())
            }
            Judgement::Stale(sign) => {
                let sign = sign.text();
                let noise = noise.map_or("unknown".to_owned(), |noise| format!("{noise:.1e}"));
                Err(Stop::Fault(Fault::OtherWeights(format!(
                    "its log-probs of {tokens} tokens {sign}: they are {error:.1e} nats per token from the learner's under {id} and \
                     {from_previous:.1e} from those under {before}, which are {change:.1e} apart; its noise is {noise}"
                ))))
            }
            Judgement::Off => Err(Stop::Wrong(format!(
                "the log-probs of {tokens} tokens on {} are {error:.3} nats per token from the learner's after the update from {before} to \
                 {id}, and `rollout.vllm.max_probe_error` is {most}: the server does not compute with the published weights, or in \
                 another precision (they are {from_previous:.3} from those under {before})",
                self.endpoint
            ))),
        }
    }

    /// Watches a server that serves, until it is to have another version or something is wrong with it.
    async fn watch(&mut self, serves: &Prepared) -> Result<(), Fault> {
        let mut missed = 0;
        loop {
            let woken = tokio::select! {
                changed = self.target.changed() => return changed.map_err(ended),
                () = self.wake.called() => true,
                () = sleep(self.shared.timing.look) => false,
            };
            if let Some(fault) = self.wake.accused() {
                return Err(fault);
            }
            let looked = match self.client.weight_label().await {
                Ok(label) if label != serves.label => {
                    let id = serves.id();
                    return Err(Fault::OtherWeights(format!("{label:?} instead of {id}; was it restarted?")));
                }
                Ok(_) => self.client.load().await,
                Err(fault) => Err(fault),
            };
            match looked {
                Ok(load) => {
                    missed = 0;
                    self.tell(News::Load(load)).await;
                    if woken {
                        self.tell(News::Ready(serves.id(), serves.label.clone())).await;
                    }
                }
                // Nothing listens there, so there is nothing to wait for.
                Err(fault @ Fault::Unreachable(_)) => return Err(fault),
                Err(fault) => {
                    missed += 1;
                    if missed >= MISSED_LOOKS {
                        return Err(fault);
                    }
                    // Look again without waiting: it is suspect until it answers.
                    if woken {
                        self.wake.call();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_rotates_by_the_list_of_the_job() {
        let problem = |longest, short_positions, most: u64| {
            let needs = Needs {
                longest,
                short_positions,
                processed_logprobs: false,
                drained_updates: false,
                checksums: false,
                max_probe_error: 1.0,
                tied: false,
                untied_head: false,
                drain: Duration::ZERO,
            };
            needs.other_factors(most)
        };
        assert_eq!(problem(3000, None, 131_072), None);
        assert_eq!(problem(3000, Some(4096), 4096), None, "both by the first list");
        assert_eq!(problem(4097, Some(4096), 131_072), None, "both by the second list");
        let said = problem(3000, Some(4096), 4097).expect("the server takes the second list");
        assert!(said.ends_with("`short_factor`: start it with --max-model-len 4096"), "{said}");
        // A server needs one token more than the longest sequence.
        let said = problem(4096, Some(4096), 4097).expect("the server takes the second list");
        assert!(said.contains("lower `data.max_prompt_tokens` by 1"), "{said}");
    }
}
