use std::collections::{HashMap, HashSet};

use pacs_types::mix;

use super::*;

/// What a place of a block holds: group or sample, position, and the weights it was computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Prompt { group: u64, position: usize, weights: u64 },
    Answer { sample: u64, position: usize },
}

/// A device that computes plans without tensors, and checks that what a row reads is what it should.
struct Simulation {
    scheduler: Scheduler<Sample, Option<u64>>,
    cache: HashMap<(u32, usize), Held>,
    weights: u64,
    random: u64,
    finished: Vec<u64>,
    most_tokens_of_a_pass: usize,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    id: u64,
    group: u64,
    length: usize,
    generated: usize,
}

fn place(blocks: &[u32], position: usize) -> (u32, usize) {
    (blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS)
}

impl Simulation {
    fn new(bounds: Bounds) -> Self {
        Self {
            scheduler: Scheduler::new(bounds),
            cache: HashMap::new(),
            weights: 0,
            random: 7,
            finished: Vec::new(),
            most_tokens_of_a_pass: 0,
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random = mix(self.random);
        self.random % end
    }

    fn submit(&mut self, group: u64, prompt_tokens: usize, lengths: &[usize]) {
        for (index, &length) in (0..).zip(lengths) {
            let sample = Sample { id: group * 100 + index, group, length, generated: 0 };
            assert!(self.scheduler.could_hold(prompt_tokens, length));
            self.scheduler.submit(group, prompt_tokens, length, sample);
        }
    }

    fn step(&mut self) {
        let plan = self.scheduler.plan();
        assert!(!plan.is_empty(), "there is work, and nothing is done");
        self.check_blocks();
        let chunk_tokens: usize = plan.chunks.iter().map(|chunk| chunk.tokens).sum();
        self.most_tokens_of_a_pass = self.most_tokens_of_a_pass.max(chunk_tokens);
        for chunk in &plan.chunks {
            let (row, prompt) = (&self.scheduler.running()[chunk.row], self.scheduler.prompt(chunk.row));
            for position in chunk.start..chunk.start + chunk.tokens {
                let (place, held) = match chunk.source {
                    Source::Prompt => {
                        let held = Held::Prompt { group: row.sample.group, position, weights: self.weights };
                        (place(&prompt.blocks, position), held)
                    }
                    Source::Answer => {
                        assert!(prompt.is_filled() && position + 1 < row.sample.generated);
                        (place(&row.blocks, position), Held::Answer { sample: row.sample.id, position })
                    }
                };
                self.cache.insert(place, held);
            }
        }
        for &index in &plan.decode {
            let row = &self.scheduler.running()[index];
            let position = row.sample.generated - 1;
            let held = Held::Answer { sample: row.sample.id, position };
            self.cache.insert(place(&row.blocks, position), held);
        }
        for &index in &plan.decode {
            self.check_reads(index);
        }
        let Computed { completed, starts } = self.scheduler.computed(&plan);
        for &(row, chunk) in &completed {
            assert_eq!(plan.chunks[chunk].source, Source::Prompt);
            self.scheduler.prompt_mut(row).kept = Some(self.weights);
        }
        for &row in plan.joined.iter().chain(starts.iter().map(|(row, _)| row)) {
            self.check_reads(row);
            assert_eq!(self.scheduler.prompt(row).kept, Some(self.weights), "what it starts from is of other weights");
        }
        let started = starts.iter().map(|(row, _)| row);
        let mut rows: Vec<usize> = plan.decode.iter().chain(&plan.joined).chain(started).copied().collect();
        rows.sort_unstable();
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "a row gets one token a pass");
        for row in rows.into_iter().rev() {
            self.scheduler.generated(row);
            let sample = self.scheduler.sample_mut(row);
            sample.generated += 1;
            if sample.generated == sample.length {
                self.finished.push(self.scheduler.finish(row).id);
            }
        }
        self.check_blocks();
    }

    /// Everything that a row attends to is there, in its place.
    fn check_reads(&self, index: usize) {
        let (row, prompt) = (&self.scheduler.running()[index], self.scheduler.prompt(index));
        let mut weights = HashSet::new();
        for expected in 0..prompt.tokens {
            let Some(Held::Prompt { group, position, weights: of }) = self.cache.get(&place(&prompt.blocks, expected))
            else {
                panic!("prompt token {expected} of {:?} is not there", row.sample);
            };
            assert_eq!((*group, *position), (row.sample.group, expected));
            weights.insert(*of);
        }
        assert_eq!(weights.len(), 1, "a prompt is of one version");
        for position in 0..row.sample.generated {
            let expected = Held::Answer { sample: row.sample.id, position };
            assert_eq!(self.cache.get(&place(&row.blocks, position)), Some(&expected));
        }
    }

    /// Every block has one owner, and owners have no more than they need.
    fn check_blocks(&self) {
        let BlockCounts { free, prompts, answers, total } = self.scheduler.blocks();
        assert_eq!(free + prompts + answers, total);
        let mut owned: Vec<u32> = self.scheduler.free.clone();
        owned.extend(self.scheduler.prompts.values().flat_map(|prompt| prompt.blocks.iter()));
        owned.extend(self.scheduler.running.iter().flat_map(|row| &row.blocks));
        owned.sort_unstable();
        assert!(owned.into_iter().eq(0..total as u32), "a block is lost or has two owners");
        for prompt in self.scheduler.prompts.values() {
            assert!(prompt.users > 0 && prompt.blocks.len() == blocks_of(prompt.tokens));
        }
        for row in &self.scheduler.running {
            assert!(row.blocks.len() <= blocks_of(row.tokens.max(1)));
        }
        let ages = self.scheduler.running.iter().map(|row| row.age).chain(self.scheduler.waiting.iter().map(|w| w.age));
        assert!(ages.is_sorted(), "somebody was overtaken");
    }

    fn run(&mut self) {
        let mut steps = 0;
        while !self.scheduler.running.is_empty() || self.scheduler.waiting() > 0 {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "no end in sight");
        }
    }
}

fn bounds(rows: usize, blocks: usize) -> Bounds {
    Bounds { rows, chunk_tokens: 50, blocks, one_chunk: false }
}

#[test]
fn a_prompt_is_computed_once_for_its_group() {
    let mut simulation = Simulation::new(bounds(8, 100));
    simulation.submit(1, 70, &[5, 9, 40, 33]);
    let first = simulation.scheduler.plan();
    assert_eq!(first.chunks, [Chunk { row: 0, source: Source::Prompt, start: 0, tokens: 50 }]);
    let counts = simulation.scheduler.blocks();
    assert_eq!((counts.prompts, counts.answers), (3, 4));
    simulation.scheduler.computed(&first);
    let second = simulation.scheduler.plan();
    assert_eq!(second.chunks, [Chunk { row: 0, source: Source::Prompt, start: 50, tokens: 20 }]);
    let starts = (0..4).map(|row| (row, 0)).collect();
    assert_eq!(simulation.scheduler.computed(&second), Computed { completed: vec![(0, 0)], starts });
}

#[test]
fn long_prompts_are_prefilled_in_chunks_among_decodes() {
    let mut simulation = Simulation::new(bounds(8, 100));
    simulation.submit(1, 10, &[20]);
    simulation.step();
    simulation.submit(2, 170, &[3]);
    for chunk in [50, 50, 50, 20] {
        let plan = simulation.scheduler.plan();
        assert_eq!((plan.decode.len(), plan.chunks[0].tokens), (1, chunk));
        simulation.step();
    }
    assert_eq!(simulation.scheduler.plan().decode, [0, 1]);
}

#[test]
fn the_youngest_pays_when_blocks_run_out() {
    // Two samples of two blocks each and a prompt do not fit into four blocks.
    let mut simulation = Simulation::new(bounds(8, 4));
    simulation.submit(1, 20, &[64, 64]);
    simulation.run();
    assert_eq!(simulation.finished, [100, 101]);
    assert!(simulation.scheduler.preemptions() > 0);
    assert_eq!(simulation.scheduler.blocks().free, 4);
}

#[test]
fn a_cache_that_holds_all_admits_all() {
    // Two blocks of prompt and two of answer for each of three groups.
    let mut simulation = Simulation::new(bounds(8, 12));
    for group in 1..=3 {
        simulation.submit(group, 40, &[64]);
    }
    for _ in 0..40 {
        simulation.step();
    }
    assert_eq!(simulation.scheduler.running().len(), 3, "none has to wait for what another may need");
    simulation.run();
    assert_eq!(simulation.scheduler.preemptions(), 0);
}

#[test]
fn new_weights_close_prompts() {
    let mut simulation = Simulation::new(bounds(2, 100));
    simulation.submit(1, 40, &[9, 9, 9, 9]);
    simulation.submit(2, 120, &[4]);
    for _ in 0..40 {
        if simulation.scheduler.waiting() + simulation.scheduler.running().len() == 0 {
            break;
        }
        // Steps check that nobody joins a prompt of other weights, and that no prompt is of two versions.
        simulation.step();
        simulation.weights += 1;
        simulation.scheduler.close_prompts();
    }
    assert_eq!(simulation.finished.len(), 4, "a prompt that takes longer than weights live is never done");
    simulation.run();
    assert_eq!(simulation.finished.len(), 5);
}

#[test]
fn nothing_is_lost_under_any_fault() {
    for one_chunk in [false, true] {
        let mut simulation = Simulation::new(Bounds { one_chunk, ..bounds(12, 24) });
        let (mut submitted, mut cancelled) = (HashSet::new(), HashSet::new());
        for group in 1..=120u64 {
            let prompt = 1 + simulation.below(150) as usize;
            let lengths: Vec<usize> =
                (0..1 + simulation.below(8)).map(|_| 1 + simulation.below(200) as usize).collect();
            submitted.extend((0..lengths.len() as u64).map(|index| group * 100 + index));
            simulation.submit(group, prompt, &lengths);
            for _ in 0..simulation.below(120) {
                if simulation.scheduler.waiting() + simulation.scheduler.running().len() > 0 {
                    simulation.step();
                }
            }
            if simulation.below(3) == 0 {
                let gone = 1 + simulation.below(group);
                simulation.scheduler.cancel(gone);
                simulation.check_blocks();
                cancelled.insert(gone);
            }
            if simulation.below(4) == 0 {
                simulation.weights += 1;
                simulation.scheduler.close_prompts();
            }
        }
        simulation.run();
        let finished: HashSet<u64> = simulation.finished.iter().copied().collect();
        assert_eq!(finished.len(), simulation.finished.len(), "a sample finished twice");
        assert!(submitted.iter().all(|id| finished.contains(id) || cancelled.contains(&(id / 100))));
        assert!(simulation.scheduler.preemptions() > 40, "{} preemptions", simulation.scheduler.preemptions());
        assert!(simulation.most_tokens_of_a_pass <= 50);
        let counts = simulation.scheduler.blocks();
        assert_eq!((counts.free, counts.prompts, counts.answers), (24, 0, 0));
        assert!(simulation.scheduler.open.is_empty());
    }
}
