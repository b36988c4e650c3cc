//! Ranks of a measurement: one thread of this process each, connected by the TCP ring.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use pacs_collective::{GroupConfig, HostCollective, HostListener};
use pacs_types::Generation;

/// How long ranks wait for each other: a step of a slow machine, with a margin.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs every rank on a thread with its member, and returns the results by rank.
///
/// # Errors
/// The error of the first rank that fails; the others then lose their peer.
pub(super) fn on_ranks<M: Send, T: Send>(
    members: Vec<M>,
    run: impl Fn(usize, M, &mut HostCollective) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let listeners = members.iter().map(|_| HostListener::bind("127.0.0.1:0").context("join the ranks"));
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let rank = |rank: usize, member: M, listener: &HostListener| {
        let (addresses, generation) = (addresses.clone(), Generation(1));
        let group = GroupConfig { job: "bench".into(), generation, rank, addresses, timeout: TIMEOUT };
        run(rank, member, &mut HostCollective::connect(listener, group).context("join the ring")?)
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let start = |(number, (member, listener))| scope.spawn(move || rank(number, member, listener));
        let threads: Vec<_> = members.into_iter().zip(&listeners).enumerate().map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
            thread.join().map_err(|_| anyhow!("measure: a rank panicked"))?
        };
        threads.into_iter().map(join).collect()
    })
}

#[cfg(test)]
mod tests {
    use pacs_collective::Collective;

    use super::*;

    #[test]
    fn ranks_meet_and_a_failure_is_reported() {
        let sums = on_ranks(vec![1.0, 2.0, 4.0], |rank, mine, collective| {
            let all = collective.all_gather_f64(&[mine])?;
            Ok((rank, all.into_iter().flatten().sum::<f64>()))
        });
        assert_eq!(sums.unwrap(), [(0, 7.0), (1, 7.0), (2, 7.0)]);
        let failed = on_ranks(vec![(), ()], |rank, (), collective| match rank {
            0 => Err(anyhow!("no")),
            _ => Ok(collective.barrier()?),
        });
        assert!(failed.is_err());
    }
}
