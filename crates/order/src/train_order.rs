use std::sync::Mutex;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The endless, seeded order of one set of training problems.
///
/// The cursor counts draws from the start of the job. Epoch `cursor / len` has its own permutation, a function of
/// (seed, epoch) by ChaCha8 and a Fisher-Yates shuffle. The shuffle is written out here, so that the order is the same
/// on every machine and with every version of every library. Without shuffling, every epoch is in source order.
#[derive(Debug)]
pub struct TrainOrder {
    seed: u64,
    /// Number of the set within the job, which selects its random stream.
    set: u8,
    len: usize,
    shuffle: bool,
    /// The permutation of the last epoch asked for; one is enough, because draws come in order.
    cached: Mutex<Option<(u64, Vec<u32>)>>,
}

impl TrainOrder {
    /// Creates the order of `len` problems, at least one.
    ///
    /// # Panics
    /// When `len` is zero or beyond 32 bits.
    #[must_use]
    pub fn new(seed: u64, len: usize, shuffle: bool) -> Self {
        Self::of_set(seed, 0, len, shuffle)
    }

    /// The same for a further set of the job, with an order independent of the others.
    pub(crate) fn of_set(seed: u64, set: u8, len: usize, shuffle: bool) -> Self {
        assert!(len > 0 && u32::try_from(len).is_ok(), "an order needs 1 to 2^32 - 1 problems, got {len}");
        Self { seed, set, len, shuffle, cached: Mutex::new(None) }
    }

    /// Index of the problem drawn at `cursor`.
    ///
    /// # Panics
    /// Never: no holder of the lock panics.
    #[must_use]
    pub fn index_at(&self, cursor: u64) -> usize {
        let len = self.len as u64;
        let epoch = cursor / len;
        let position = (cursor % len) as usize;
        if !self.shuffle {
            return position;
        }
        let mut cached = self.cached.lock().expect("no holder of this lock panics");
        if cached.as_ref().is_none_or(|(known, _)| *known != epoch) {
            *cached = None;
        }
        let (_, permutation) =
            cached.get_or_insert_with(|| (epoch, permutation(Stream::Epoch(self.set), self.seed, epoch, self.len)));
        permutation[position] as usize
    }
}

/// Purpose of a permutation; different streams with the same seed are independent.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// Order of one epoch of the set with this number.
    Epoch(u8),
    /// Split and order of generated problems.
    Generator,
}

/// A random permutation of `0..len`, a function of its arguments.
///
/// # Panics
/// When `len` is beyond 32 bits.
#[must_use]
pub fn permutation(stream: Stream, seed: u64, number: u64, len: usize) -> Vec<u32> {
    let mut random = Numbers::new(stream, seed, number);
    let mut order: Vec<u32> = (0..u32::try_from(len).expect("lengths are checked where they come in")).collect();
    for last in (1..len).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// A stream of random numbers from ChaCha8, determined by purpose, seed and number: the same on every machine and with
/// every version of every library.
#[derive(Debug)]
pub struct Numbers {
    random: ChaCha8Rng,
}

impl Numbers {
    /// Starts the stream of `seed` and `number` for a purpose.
    #[must_use]
    pub fn new(stream: Stream, seed: u64, number: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&number.to_le_bytes());
        (key[16], key[17]) = match stream {
            Stream::Epoch(set) => (1, set),
            Stream::Generator => (2, 0),
        };
        Self { random: ChaCha8Rng::from_seed(key) }
    }

    /// The next number in `0..bound`; 0 if `bound` is 0.
    #[must_use]
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product is uniform up to a bias of bound / 2^64.
        let product = u128::from(self.random.next_u64()) * u128::from(bound);
        (product >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(order: &TrainOrder, cursors: std::ops::Range<u64>) -> Vec<usize> {
        cursors.map(|cursor| order.index_at(cursor)).collect()
    }

    #[test]
    fn every_epoch_draws_every_problem_once() {
        let order = TrainOrder::new(7, 100, true);
        let mut epochs: Vec<Vec<usize>> = (0..3).map(|epoch| drawn(&order, epoch * 100..(epoch + 1) * 100)).collect();
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[1], epochs[2]);
        for epoch in &mut epochs {
            assert_ne!(*epoch, (0..100).collect::<Vec<_>>());
            epoch.sort_unstable();
            assert_eq!(*epoch, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_resumed_order_continues_where_it_was() {
        let all = drawn(&TrainOrder::new(7, 30, true), 0..200);
        for start in [0, 1, 29, 30, 31, 150] {
            let resumed = TrainOrder::new(7, 30, true);
            assert_eq!(drawn(&resumed, start..200), all[start as usize..]);
        }
        assert_eq!(TrainOrder::new(7, 30, true).index_at(199), all[199], "a jump equals walking there");
        assert_ne!(drawn(&TrainOrder::new(8, 30, true), 0..200), all, "another seed is another order");
    }

    #[test]
    fn without_shuffling_the_source_order_repeats() {
        assert_eq!(drawn(&TrainOrder::new(7, 3, false), 1..8), [1, 2, 0, 1, 2, 0, 1]);
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        // Resumed jobs depend on these values.
        assert_eq!(permutation(Stream::Epoch(0), 1, 0, 8), [1, 7, 4, 5, 0, 6, 2, 3]);
        assert_eq!(permutation(Stream::Generator, 1, 0, 8), [7, 4, 5, 3, 2, 0, 1, 6]);
    }
}
