//! `pacs dashboard`: prints an address of a run's dashboard, or serves one over several runs.

use std::io::IsTerminal as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::anyhow;
use clap::Args;
use pacs_coordinator::DashboardRecord;
use pacs_dashboard::{Key, Run, Server, ServerError, TOKEN_HOURS};
use pacs_runtime::{Exit, Shutdown};
use serde_json::json;

use super::Looked;
use crate::client::block_on;
use crate::failure::Failure;
use crate::output;

/// Port of a dashboard, unless another one is given or it is in use.
pub(crate) const DEFAULT_PORT: u16 = 7780;
/// Most runs on one page: more curves than colours cannot be told apart.
const MOST_RUNS: usize = 7;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs dashboard                            an address of the dashboard of the run on this machine
  pacs dashboard runs/first runs/second     a dashboard over both, served until Ctrl-C; runs may be over
  pacs dashboard node-1:7700                the same for a run on another machine, with the certificates of PACS_TLS_DIR

A run of `pacs run` serves its own dashboard, and this command prints its address with a token that is valid for 12 hours. Several
runs, a run that is over and one on another machine are served by this command itself. Nothing on the page changes a run.")]
pub(crate) struct Dashboard {
    /// The runs, at most 7, each named by its folder, or for a live run also by its coordinator (host:port), job, or the first digits
    /// of its id. Default: the live run of this machine.
    pub(crate) targets: Vec<String>,
    /// Serve the page from this command at this loopback address. Default: only where the run does not serve its own; at
    /// 127.0.0.1:7780, or another port when that one is in use.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Print the address and the hours that its token is valid for as a JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Dashboard) -> Result<Exit, Failure> {
    if arguments.targets.len() > MOST_RUNS {
        let error = anyhow!("{} runs are named, expected at most {MOST_RUNS}", arguments.targets.len());
        return Err(Failure::with_exit(Exit::Usage, error).doing("show the runs"));
    }
    block_on(async {
        let mut runs = Vec::new();
        for target in &arguments.targets {
            runs.push(Looked::find(Some(target)).await?);
        }
        if runs.is_empty() {
            runs.push(Looked::find(None).await?);
        }
        if let ([only], None) = (runs.as_slice(), arguments.listen)
            && let Some(link) = own_link(only)
        {
            say(arguments, &link, &format!("valid for {TOKEN_HOURS} hours; the run serves it"));
            return Ok(Exit::Done);
        }
        serve(arguments, runs).await
    })
}

/// The address of the dashboard that the run's coordinator serves, if it does and its key can be read here.
fn own_link(run: &Looked) -> Option<String> {
    let folder = run.folder.as_deref().filter(|_| run.is_live())?;
    let (record, key) = DashboardRecord::read(folder)?;
    Some(key.link(record.address))
}

async fn serve(arguments: &Dashboard, runs: Vec<Looked>) -> Result<Exit, Failure> {
    let shutdown = Shutdown::new();
    shutdown.on_signals().map_err(|error| Failure::bug(error).doing("install signal handlers"))?;
    let count = runs.len();
    let runs: Vec<Run> = runs.into_iter().map(as_run).collect();
    let name: String = runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join("");
    let server = bind(arguments.listen, &name, runs).await?;
    let what = if count == 1 { "one run".to_owned() } else { format!("{count} runs") };
    say(
        arguments,
        &server.link(),
        &format!("serving {what} until Ctrl-C; the address is valid for {TOKEN_HOURS} hours"),
    );
    shutdown.requested().await;
    Ok(Exit::Done)
}

async fn bind(listen: Option<SocketAddr>, name: &str, runs: Vec<Run>) -> Result<Server, Failure> {
    let key = Key::random().map_err(|error| Failure::again(error).doing("make a key"))?;
    let failed = |error| Failure::config(error).doing("serve the dashboard");
    let address = match listen {
        Some(address) => address,
        None => free(DEFAULT_PORT).await,
    };
    Server::bind(address, key, name, runs).await.map_err(failed)
}

/// The loopback address with this port, or with any port if it is in use.
async fn free(port: u16) -> SocketAddr {
    let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match tokio::net::TcpListener::bind(usual).await {
        Ok(_) => usual,
        Err(_) => (Ipv4Addr::LOCALHOST, 0).into(),
    }
}

/// Serves a coordinator's dashboard where `--dashboard-listen` says, or at the usual port or a free one.
///
/// # Errors
/// Only for an explicit address: a run must not fail because the default dashboard cannot be served.
pub(crate) async fn of_coordinator(
    coordinator: &pacs_coordinator::Coordinator,
    spec: &pacs_spec::JobSpec,
    listen: Option<SocketAddr>,
) -> Result<Option<Server>, Failure> {
    let address = match listen {
        Some(address) => address,
        None => free(DEFAULT_PORT).await,
    };
    match coordinator.observer().serve_dashboard(address, spec).await {
        Ok(server) => Ok(Some(server)),
        Err(error) if listen.is_none() => {
            tracing::warn!("the run has no dashboard: {error}");
            Ok(None)
        }
        Err(error) => {
            let is_taken = matches!(&error, pacs_coordinator::DashboardError::Server(ServerError::Listen { .. }));
            let failure = if is_taken { Failure::again(error) } else { Failure::config(error) };
            Err(failure.doing("serve the dashboard"))
        }
    }
}

/// The address to print where a run starts: with a token for a person at a terminal, without one where it may end up in a log.
pub(crate) fn shown(server: &Server) -> String {
    match std::io::stdout().is_terminal() {
        true => server.link(),
        false => format!("http://{} (`pacs dashboard` prints an address with a token)", server.address()),
    }
}

fn as_run(looked: Looked) -> Run {
    let folder = looked.folder.clone();
    let settings = folder.as_deref().and_then(|folder| std::fs::read_to_string(folder.join("job.toml")).ok());
    let settings = settings.unwrap_or_else(|| "# The run folder is on another machine.\n".to_owned());
    let model = pacs_spec::parse(&settings, Path::new("job.toml")).ok().map(|spec| spec.model.path);
    Run {
        name: looked.name.clone(),
        live: looked.is_live(),
        settings,
        model: model.filter(|folder| folder.join("tokenizer.json").is_file()),
        facts: folder.iter().map(|folder| ("run folder".to_owned(), folder.display().to_string())).collect(),
        source: looked.into_dashboard_source(),
    }
}

fn say(arguments: &Dashboard, link: &str, about: &str) {
    match arguments.json {
        true => output::json(json!({"url": link, "hours": TOKEN_HOURS})),
        false => {
            output::line(link);
            output::line(format_args!("({about})"));
        }
    }
}
