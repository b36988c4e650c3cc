//! Limits a status to the size of a message, for any number of workers and any names.

use std::collections::HashMap;

use pacs_protocol::{ANSWER_BYTES, v1};
use prost::Message;

/// Bytes of a name, host or activity that are kept.
const SHOWN: usize = 256;
/// Bytes of a sentence that are kept.
const SENTENCE: usize = 2048;
/// Bytes for tag and length of a list or map entry.
const ENTRY_BYTES: usize = 12;

/// Cuts every list of a status to its share of the space; [`v1::GetStatusResponse::left_out`] counts what was cut.
pub(crate) fn bounded(mut status: v1::GetStatusResponse) -> v1::GetStatusResponse {
    for worker in &mut status.workers {
        let texts = [&mut worker.name, &mut worker.host, &mut worker.activity];
        texts.into_iter().for_each(|text| shorten(text, SHOWN));
    }
    for verifier in &mut status.verifiers {
        let texts = [&mut verifier.worker, &mut verifier.verifier];
        texts.into_iter().for_each(|text| shorten(text, SHOWN));
    }
    for action in &mut status.actions {
        shorten(&mut action.operator, SHOWN);
        shorten(&mut action.action, SENTENCE);
    }
    for finding in &mut status.findings {
        shorten(&mut finding.sentence, SENTENCE);
    }
    for group in &mut status.set_aside {
        shorten(&mut group.reason, SENTENCE);
    }
    shorten(&mut status.waiting_for, SENTENCE);
    if let Some(group) = &mut status.oldest_group {
        shorten(group, SENTENCE);
    }
    let left_out = [
        ("workers", cut(&mut status.workers, Message::encoded_len)),
        ("verifiers", cut(&mut status.verifiers, Message::encoded_len)),
        ("actions", cut(&mut status.actions, Message::encoded_len)),
        ("set_aside", cut(&mut status.set_aside, Message::encoded_len)),
        ("metrics", cut_map(&mut status.metrics)),
        ("counters", cut_map(&mut status.counters)),
    ];
    let cut = left_out.into_iter().filter(|(_, count)| *count > 0);
    status.left_out = cut.map(|(name, count)| (name.to_owned(), u32::try_from(count).unwrap_or(u32::MAX))).collect();
    status
}

/// Cuts the texts of a server's description.
pub(crate) fn shorten_server(server: &mut v1::EngineServer) {
    let texts = [&mut server.address, &mut server.state, &mut server.error];
    texts.into_iter().for_each(|text| shorten(text, SHOWN));
}

/// Cuts a text off at a number of bytes.
fn shorten(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push('…');
    }
}

/// Keeps the first entries, as many as fit into half of an answer: there are six lists. Returns the number removed.
fn cut<T>(entries: &mut Vec<T>, bytes: impl Fn(&T) -> usize) -> usize {
    let mut room = ANSWER_BYTES / 2;
    let fits = |entry: &&T| match room.checked_sub(bytes(entry) + ENTRY_BYTES) {
        Some(left) => {
            room = left;
            true
        }
        None => false,
    };
    let fitting = entries.iter().take_while(fits).count();
    entries.split_off(fitting).len()
}

/// The same for a map, in order of names, so that what is kept does not depend on hashing.
fn cut_map<V>(map: &mut HashMap<String, V>) -> usize {
    let mut entries: Vec<_> = std::mem::take(map).into_iter().collect();
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    let gone = cut(&mut entries, |(name, _)| name.len() + size_of::<V>());
    map.extend(entries);
    gone
}

#[cfg(test)]
mod tests {
    use pacs_protocol::MAX_MESSAGE_BYTES;

    use super::*;

    #[test]
    fn a_small_status_is_whole() {
        let worker = v1::WorkerStatus { name: "rollout-0".into(), ..Default::default() };
        let counters = [("restarted_workers".to_owned(), 3)].into();
        let status = v1::GetStatusResponse { workers: vec![worker; 3], counters, ..Default::default() };
        assert_eq!(bounded(status.clone()), status);
    }

    #[test]
    fn a_status_fits_however_many_there_are_and_whatever_they_are_called() {
        let name = "ä".repeat(100_000);
        let worker = v1::WorkerStatus {
            name: name.clone(),
            host: name.clone(),
            activity: name.clone(),
            leases: 3,
            ..Default::default()
        };
        let verifier = v1::VerifierStatus { worker: name.clone(), verifier: name.clone(), ..Default::default() };
        let long = &name[..200];
        let numbers = |count: usize| (0..count).map(move |i| format!("{i:08}{long}"));
        let status = v1::GetStatusResponse {
            workers: vec![worker; 400],
            verifiers: vec![verifier; 300],
            metrics: numbers(50_000).map(|name| (name, 1.0)).collect(),
            counters: numbers(50_000).map(|name| (name, 1)).collect(),
            waiting_for: "x".repeat(40 << 20),
            ..Default::default()
        };
        let status = bounded(status);
        assert!(status.encoded_len() <= MAX_MESSAGE_BYTES, "{} bytes", status.encoded_len());
        assert!(status.workers[0].name.len() < 300 && status.workers[0].name.ends_with('…'));
        assert_eq!((status.workers.len(), status.left_out.get("workers")), (400, None));
        assert_eq!(status.metrics.len() + status.left_out["metrics"] as usize, 50_000);
        assert!(status.counters.keys().all(|name| name.as_str() < "00020000"), "the first by name");
        let worker = v1::WorkerStatus { name: "rollout".into(), ..Default::default() };
        let many = bounded(v1::GetStatusResponse { workers: vec![worker; 300_000], ..Default::default() });
        assert!(many.encoded_len() <= MAX_MESSAGE_BYTES);
        assert!(many.workers.len() > 10_000, "{} are shown", many.workers.len());
        assert_eq!(many.workers.len() + many.left_out["workers"] as usize, 300_000);
    }
}
