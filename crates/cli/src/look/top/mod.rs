//! `pacs top`: a live run on one screen, or one line per event where standard output is no terminal.

mod draw;
mod lines;

use std::collections::{BTreeMap, VecDeque};
use std::io::{IsTerminal, stdout};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::{self, GetStatusRequest};
use pacs_runtime::Exit;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;
use tonic::Streaming;
use tonic::transport::Channel;

pub(super) use self::lines::{clock, words};
use crate::client::{block_on, channel, in_time};
use crate::failure::Failure;
use crate::target;

/// Refresh interval of the screen.
const REFRESH: Duration = Duration::from_secs(1);
/// Wait before a lost coordinator is dialled again.
const RECONNECT: Duration = Duration::from_secs(2);
/// Events kept for scrolling.
const MOST_EVENTS: usize = 500;
const SAMPLES: u32 = 50;
/// Points requested per curve, more than a screen has columns of dots.
const POINTS: u32 = 400;
/// Bound of the queue of keys pressed while the screen is drawn.
const KEYS: usize = 32;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs top                              the run on this machine
  pacs top runs/demo                    the run in that folder
  pacs top | tee run.log                a line for each event, while the run is live
  pacs top --json | jq -c .             the same for scripts

Keys: o overview, w workers, s samples, e events, arrows and page keys to scroll, q to leave. Nothing here changes the run.")]
pub(crate) struct Top {
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this machine.
    pub(crate) target: Option<String>,
    /// Print events as JSON, one object per line, and draw nothing.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The page that is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum View {
    #[default]
    Overview,
    Workers,
    Samples,
    Events,
}

/// The state that the screen is drawn from.
#[derive(Debug, Default)]
struct Screen {
    view: View,
    scroll: usize,
    address: String,
    status: v1::GetStatusResponse,
    steps: BTreeMap<String, v1::MetricSeries>,
    evaluations: BTreeMap<String, v1::MetricSeries>,
    samples: Vec<v1::ObservedSample>,
    /// Events as formatted lines, oldest first.
    events: VecDeque<String>,
    /// Why the data is stale; `None` while the coordinator answers.
    problem: Option<String>,
    /// Whether the run has ended.
    over: bool,
}

pub(crate) fn run(arguments: &Top) -> Result<Exit, Failure> {
    let target = target::one(arguments.target.as_deref())?;
    if arguments.json || !stdout().is_terminal() {
        return block_on(async {
            let mut run = Run::connect(&target).await?;
            lines::follow(&mut run, arguments.json).await
        });
    }
    let mut screen = Screen { address: target.address.clone(), ..Screen::default() };
    block_on(async {
        // Connect before the terminal is switched to the alternate screen, so that an error stays readable.
        let run = Run::connect(&target).await?;
        let mut terminal = ratatui::try_init().context("take the screen").map_err(Failure::config)?;
        let ended = show(&target, run, &mut screen, &mut terminal).await;
        ratatui::restore();
        ended
    })?;
    Ok(Exit::Done)
}

/// A connected run with its event stream.
struct Run {
    operator: OperatorServiceClient<Channel>,
    observer: ObserveServiceClient<Channel>,
    events: Streaming<v1::WatchResponse>,
}

impl Run {
    async fn connect(target: &target::Target) -> Result<Self, Failure> {
        let channel = channel(target).await?;
        let operator = OperatorServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut observer = ObserveServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let events = in_time(observer.watch(v1::WatchRequest { past: 200 })).await;
        let events = events.map_err(|failure| failure.doing("watch the run"))?;
        Ok(Self { operator, observer, events })
    }

    /// Fetches what the current view shows.
    async fn look(&mut self, screen: &mut Screen) -> Result<(), Failure> {
        let status = in_time(self.operator.get_status(GetStatusRequest {})).await?;
        // Curves change only with a new step or evaluation, so they are fetched only then.
        let is_new =
            (status.step, &status.phase) != (screen.status.step, &screen.status.phase) || screen.steps.is_empty();
        screen.status = status;
        if is_new {
            for (purpose, series) in
                [(v1::Purpose::Train, &mut screen.steps), (v1::Purpose::Evaluate, &mut screen.evaluations)]
            {
                let names = draw::METRICS.map(str::to_owned).to_vec();
                let request =
                    v1::GetMetricsRequest { purpose: purpose.into(), names, most_points: POINTS, ..Default::default() };
                let response = in_time(self.observer.get_metrics(request)).await?;
                *series = response.series.into_iter().map(|series| (series.name.clone(), series)).collect();
            }
        }
        if screen.view == View::Samples {
            let request = v1::ListSamplesRequest { limit: SAMPLES, text_bytes: 300, ..Default::default() };
            screen.samples = in_time(self.observer.list_samples(request)).await?.samples;
        }
        Ok(())
    }
}

/// An event of the screen's loop.
enum Happening {
    Key(KeyCode, KeyModifiers),
    Resized,
    Event(Option<Box<v1::WatchResponse>>),
    Refresh,
}

/// Shows the run until the user leaves. A lost coordinator is dialled again, because it may be restarting.
async fn show(
    target: &target::Target,
    run: Run,
    screen: &mut Screen,
    terminal: &mut DefaultTerminal,
) -> Result<(), Failure> {
    let mut keys = keys();
    let mut run = Some(run);
    let mut refresh = tokio::time::interval(REFRESH);
    refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let happening = tokio::select! {
            key = keys.recv() => match key {
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => Happening::Key(key.code, key.modifiers),
                Some(_) => Happening::Resized,
                // The terminal was closed.
                None => return Ok(()),
            },
            event = next_event(&mut run) => Happening::Event(event.map(Box::new)),
            _ = refresh.tick() => Happening::Refresh,
        };
        match happening {
            Happening::Key(KeyCode::Char('c'), modifiers) if modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
            Happening::Key(key, _) => {
                if !screen.press(key) {
                    return Ok(());
                }
                // Refresh at once: the new view's data has not been fetched yet.
                refresh.reset_immediately();
            }
            Happening::Resized => {}
            Happening::Event(Some(event)) => screen.take(&event),
            Happening::Event(None) => {
                run = None;
                let why = if screen.over { "the run is over" } else { "the coordinator is gone; looking for it" };
                screen.problem = Some(why.to_owned());
            }
            Happening::Refresh => {
                if run.is_none() && !screen.over {
                    run = tokio::time::timeout(RECONNECT, Run::connect(target)).await.ok().and_then(Result::ok);
                    if run.is_some() {
                        // The new stream begins with past events, which would otherwise be listed twice.
                        screen.events.clear();
                    }
                }
                if let Some(run) = &mut run {
                    screen.problem = run.look(screen).await.err().map(|failure| failure.to_string());
                }
            }
        }
        terminal.draw(|frame| draw::draw(frame, screen)).context("draw").map_err(Failure::bug)?;
    }
}

/// Returns the next event, or `None` when the stream has ended; pends forever without a connection.
async fn next_event(run: &mut Option<Run>) -> Option<v1::WatchResponse> {
    match run {
        Some(run) => run.events.message().await.ok().flatten(),
        None => std::future::pending().await,
    }
}

/// Starts a thread that reads keys and resizes; it ends with the process.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(KEYS);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Screen {
    /// Handles a key; returns false when the user leaves.
    fn press(&mut self, key: KeyCode) -> bool {
        let view = match key {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('o' | '1') => View::Overview,
            KeyCode::Char('w' | '2') => View::Workers,
            KeyCode::Char('s' | '3') => View::Samples,
            KeyCode::Char('e' | '4') => View::Events,
            KeyCode::Tab => match self.view {
                View::Overview => View::Workers,
                View::Workers => View::Samples,
                View::Samples => View::Events,
                View::Events => View::Overview,
            },
            KeyCode::Up | KeyCode::Char('k') => return self.scroll_to(self.scroll.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => return self.scroll_to(self.scroll + 1),
            KeyCode::PageUp => return self.scroll_to(self.scroll.saturating_sub(20)),
            KeyCode::PageDown => return self.scroll_to(self.scroll + 20),
            KeyCode::Home => return self.scroll_to(0),
            _ => return true,
        };
        (self.view, self.scroll) = (view, 0);
        true
    }

    fn scroll_to(&mut self, scroll: usize) -> bool {
        let lines = match self.view {
            View::Overview => 0,
            View::Workers => self.status.workers.len(),
            View::Samples => self.samples.len() * 3,
            View::Events => self.events.len(),
        };
        self.scroll = scroll.min(lines.saturating_sub(1));
        true
    }

    /// Adds an event to the list. Situations are left out, because the overview shows the current one.
    fn take(&mut self, event: &v1::WatchResponse) {
        use v1::watch_response::Event::{RunOver, Situation};
        self.over |= matches!(event.event, Some(RunOver(_)));
        if matches!(event.event, Some(Situation(_)) | None) {
            return;
        }
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(lines::as_text(event));
    }
}
