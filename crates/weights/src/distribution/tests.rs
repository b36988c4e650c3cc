use proptest::prelude::*;

use super::*;

fn version() -> VersionId {
    VersionId::new(1, 5)
}

fn tree() -> Distribution {
    let mut tree = Distribution::default();
    tree.announce(version(), "learner:1");
    tree
}

fn address(worker: u64) -> String {
    format!("host-{worker}:1")
}

fn ask(tree: &mut Distribution, worker: u64, failed: &[String]) -> Option<String> {
    tree.find(WorkerId(worker), &address(worker), failed).first().map(|source| source.address.clone())
}

#[test]
fn hosts_form_a_tree() {
    let mut tree = tree();
    let sources: Vec<_> = (1..=6).map(|worker| ask(&mut tree, worker, &[]).expect("a source")).collect();
    assert_eq!(sources, ["learner:1", "learner:1", "host-1:1", "host-2:1", "host-1:1", "host-2:1"]);
    assert_eq!(ask(&mut tree, 3, &[]).as_deref(), Some("host-1:1"), "asked again, the answer is the same");
}

#[test]
fn a_complete_host_frees_its_slot_and_serves_like_the_root() {
    let mut tree = tree();
    (1..=2).for_each(|worker| drop(ask(&mut tree, worker, &[])));
    tree.holds(WorkerId(1));
    assert_eq!(ask(&mut tree, 3, &[]).as_deref(), Some("host-1:1"), "it is idle, and the root sends to one");
    assert_eq!(ask(&mut tree, 4, &[]).as_deref(), Some("host-1:1"), "as loaded as the root, which has other work");
    assert_eq!(ask(&mut tree, 5, &[]).as_deref(), Some("learner:1"));
}

#[test]
fn a_failed_source_is_named_again_only_when_there_is_no_other() {
    let mut tree = tree();
    ask(&mut tree, 1, &[]);
    let failed = ["learner:1".to_owned()];
    assert_eq!(ask(&mut tree, 2, &failed).as_deref(), Some("host-1:1"));
    assert_eq!(ask(&mut tree, 2, &[address(1)]).as_deref(), Some("learner:1"), "both have failed");
}

#[test]
fn a_new_version_starts_afresh_and_the_gone_are_forgotten() {
    let mut tree = tree();
    (1..=3).for_each(|worker| drop(ask(&mut tree, worker, &[])));
    tree.retain(|worker| worker != WorkerId(1));
    assert_ne!(ask(&mut tree, 3, &[]).as_deref(), Some("host-1:1"));
    tree.announce(VersionId::new(1, 6), "learner:1");
    assert_eq!(ask(&mut tree, 9, &[]).as_deref(), Some("learner:1"));
}

#[test]
fn without_a_sender_there_is_no_source() {
    let mut tree = Distribution::default();
    tree.announce(version(), "");
    assert_eq!(ask(&mut tree, 1, &[]), None);
}

#[derive(Clone, Debug)]
enum Event {
    Ask {
        worker: u64,
        serves: bool,
    },
    /// Reports its source as failed.
    Fails {
        worker: u64,
    },
    Holds {
        worker: u64,
    },
    Leaves {
        worker: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let worker = 1..30u64;
    prop_oneof![
        4 => (worker.clone(), proptest::bool::weighted(0.9)).prop_map(|(worker, serves)| Event::Ask { worker, serves }),
        1 => worker.clone().prop_map(|worker| Event::Fails { worker }),
        2 => worker.clone().prop_map(|worker| Event::Holds { worker }),
        1 => worker.prop_map(|worker| Event::Leaves { worker }),
    ]
}

proptest! {
    /// After any events, every host has a source, no host fetches from itself in a circle, and no source has more
    /// receivers than it should while there are others.
    #[test]
    fn every_host_gets_a_source_and_none_waits_for_itself(events in prop::collection::vec(event(), 1..120)) {
        let mut tree = tree();
        for event in events {
            match event {
                Event::Ask { worker, serves } => {
                    let at = if serves { address(worker) } else { String::new() };
                    let found = tree.find(WorkerId(worker), &at, &[]);
                    prop_assert_eq!(found.len(), 1);
                    prop_assert_ne!(&found[0].address, &address(worker));
                }
                Event::Fails { worker } => {
                    let before = ask(&mut tree, worker, &[]).expect("a source");
                    let after = ask(&mut tree, worker, std::slice::from_ref(&before)).expect("another source");
                    let failed = &tree.hosts[&WorkerId(worker)].failed;
                    prop_assert!(before != after || failed.is_empty(), "named again although there was another");
                }
                Event::Holds { worker } => tree.holds(WorkerId(worker)),
                Event::Leaves { worker } => tree.retain(|other| other != WorkerId(worker)),
            }
            for worker in tree.hosts.keys() {
                let mut place = Place::Host(*worker);
                for step in 0.. {
                    prop_assert!(step <= tree.hosts.len(), "{:?} fetches from itself", worker);
                    match place {
                        Place::Root => break,
                        Place::Host(worker) => match tree.hosts[&worker].from {
                            Some(from) => place = from,
                            None => break,
                        },
                    }
                }
            }
        }
    }

    /// If all hosts relay and none fails, no source has more than `FAN_OUT` receivers, and the tree is balanced.
    #[test]
    fn fan_out_is_bounded(hosts in 1..200u64) {
        let mut tree = tree();
        for worker in 1..=hosts {
            ask(&mut tree, worker, &[]);
        }
        let mut loads: BTreeMap<Place, usize> = BTreeMap::new();
        tree.hosts.values().filter_map(|host| host.from).for_each(|from| *loads.entry(from).or_default() += 1);
        prop_assert!(loads.values().all(|load| *load <= FAN_OUT));
        let deepest = (1..=hosts).filter_map(|worker| tree.depth(Place::Host(WorkerId(worker)), WorkerId(0))).max();
        prop_assert!(deepest <= Some(hosts.ilog2() as usize + 1), "{:?} for {} hosts", deepest, hosts);
    }
}
