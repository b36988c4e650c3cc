//! Which samples run, which blocks hold their tokens, and what the next pass computes: integers alone, no tensors.
//!
//! A block has one owner: a prompt, which all samples of its group share and which lives as long as one of them runs, or
//! a sample. Answers begin in a block of their own, so nothing is ever copied. Samples wait in line, oldest first; one is
//! admitted when its blocks are there and one more for each that runs and may still grow, so that those can continue. When blocks run out all
//! the same, the youngest sample gives its blocks back and waits at the head of the line: its tokens are kept, and
//! their keys and values computed again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use pacs_torch::BLOCK_TOKENS;

/// What a scheduler may hand out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Samples that run at once.
    pub(crate) rows: usize,
    /// Tokens of prompts, and of answers that are computed again, in one pass.
    pub(crate) chunk_tokens: usize,
    /// Blocks of the KV cache, the bound of all that runs.
    pub(crate) blocks: usize,
    /// One prompt or answer a pass, so that where it is cut does not depend on the others.
    pub(crate) one_chunk: bool,
}

/// Blocks by owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCounts {
    /// Blocks without an owner.
    pub free: usize,
    /// Those of prompts, each of which all samples of its group share.
    pub prompts: usize,
    /// Those of samples.
    pub answers: usize,
    /// All there are.
    pub total: usize,
}

/// Names a prompt in the cache; a group that is prefilled again has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PromptId(u64);

/// A prompt in the cache, with what the caller keeps of it.
#[derive(Debug)]
pub(crate) struct Prompt<P> {
    group: u64,
    pub(crate) blocks: Arc<[u32]>,
    pub(crate) tokens: usize,
    /// Tokens whose keys and values are there.
    filled: usize,
    users: usize,
    pub(crate) kept: P,
}

impl<P> Prompt<P> {
    fn is_filled(&self) -> bool {
        self.filled == self.tokens
    }
}

/// A sample in line.
#[derive(Debug)]
struct Waiting<S> {
    age: u64,
    group: u64,
    prompt_tokens: usize,
    /// Generated before it had to wait.
    tokens: usize,
    /// Tokens that it may generate.
    most_tokens: usize,
    sample: S,
}

/// A sample that runs, with what the caller keeps of it.
#[derive(Debug)]
pub(crate) struct Running<S> {
    age: u64,
    group: u64,
    prompt: PromptId,
    prompt_tokens: usize,
    pub(crate) blocks: Vec<u32>,
    /// Generated so far.
    tokens: usize,
    /// Tokens that it may generate.
    most_tokens: usize,
    /// Generated tokens whose keys and values are there.
    filled: usize,
    pub(crate) sample: S,
}

impl<S> Running<S> {
    /// How many generated tokens the cache must hold before the newest is fed in.
    fn behind(&self) -> usize {
        self.tokens.saturating_sub(1)
    }

    fn may_decode(&self) -> bool {
        self.tokens > 0 && self.filled == self.behind()
    }

    fn may_grow(&self) -> bool {
        self.blocks.len() < blocks_of(self.most_tokens)
    }
}

/// Where the tokens of a chunk come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The prompt of the row.
    Prompt,
    /// What the row generated.
    Answer,
}

/// Consecutive tokens whose keys and values a pass computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// A running row that they belong to.
    pub(crate) row: usize,
    pub(crate) source: Source,
    pub(crate) start: usize,
    pub(crate) tokens: usize,
}

/// What to compute next; rows are indices of [`Scheduler::running`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Rows whose newest token is fed in.
    pub(crate) decode: Vec<usize>,
    pub(crate) chunks: Vec<Chunk>,
    /// Rows without a token whose prompt was filled by an earlier pass.
    pub(crate) joined: Vec<usize>,
}

/// What the chunks of a plan completed, by their places in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Computed {
    /// A row of each prompt that is complete now, and the chunk that completed it.
    pub(crate) completed: Vec<(usize, usize)>,
    /// Every row that gets its first token from such a prompt, and the same chunk.
    pub(crate) starts: Vec<(usize, usize)>,
}

impl Plan {
    pub(crate) fn is_empty(&self) -> bool {
        self.decode.is_empty() && self.chunks.is_empty() && self.joined.is_empty()
    }
}

/// Shares rows and blocks out; `S` is kept with a sample, `P` with a prompt.
#[derive(Debug)]
pub(crate) struct Scheduler<S, P> {
    bounds: Bounds,
    /// Free blocks; those used last come first, so that memory which was never needed is never touched.
    free: Vec<u32>,
    /// Sorted by age.
    waiting: VecDeque<Waiting<S>>,
    /// Sorted by age.
    running: Vec<Running<S>>,
    prompts: BTreeMap<PromptId, Prompt<P>>,
    /// Prompts that samples of a group may join.
    open: BTreeMap<u64, PromptId>,
    ages: u64,
    prompt_ids: u64,
    preemptions: u64,
}

impl<S, P: Default> Scheduler<S, P> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let blocks = u32::try_from(bounds.blocks).expect("blocks are counted by 32 bits");
        Self {
            bounds,
            free: (0..blocks).rev().collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            prompts: BTreeMap::new(),
            open: BTreeMap::new(),
            ages: 0,
            prompt_ids: 0,
            preemptions: 0,
        }
    }

    /// Whether a sample of so many tokens can ever run.
    pub(crate) fn could_hold(&self, prompt_tokens: usize, new_tokens: usize) -> bool {
        blocks_of(prompt_tokens) + blocks_of(new_tokens) <= self.bounds.blocks
    }

    /// Puts a sample of `group` in line that may generate so many tokens.
    pub(crate) fn submit(&mut self, group: u64, prompt_tokens: usize, most_tokens: usize, sample: S) {
        self.ages += 1;
        self.waiting.push_back(Waiting { age: self.ages, group, prompt_tokens, tokens: 0, most_tokens, sample });
    }

    /// Whether a sample of `group` runs or waits.
    pub(crate) fn has(&self, group: u64) -> bool {
        self.waiting.iter().any(|waiting| waiting.group == group) || self.running.iter().any(|row| row.group == group)
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn running(&self) -> &[Running<S>] {
        &self.running
    }

    pub(crate) fn sample_mut(&mut self, row: usize) -> &mut S {
        &mut self.running[row].sample
    }

    pub(crate) fn prompt(&self, row: usize) -> &Prompt<P> {
        &self.prompts[&self.running[row].prompt]
    }

    pub(crate) fn prompt_mut(&mut self, row: usize) -> &mut Prompt<P> {
        self.prompts.get_mut(&self.running[row].prompt).expect("a running row has its prompt")
    }

    /// How often a sample had to give its blocks back.
    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Counts the blocks of every owner.
    pub(crate) fn blocks(&self) -> BlockCounts {
        BlockCounts {
            free: self.free.len(),
            prompts: self.prompts.values().map(|prompt| prompt.blocks.len()).sum(),
            answers: self.running.iter().map(|row| row.blocks.len()).sum(),
            total: self.bounds.blocks,
        }
    }

    /// Keeps samples that start from now on away from what the cache holds: prompts that are complete are not joined any
    /// more, those in the making begin anew.
    pub(crate) fn close_prompts(&mut self) {
        let prompts = &mut self.prompts;
        self.open.retain(|_, id| {
            let prompt = prompts.get_mut(id).expect("an open prompt is there");
            let stays = !prompt.is_filled();
            if stays {
                prompt.filled = 0;
            }
            stays
        });
    }

    /// What the next pass computes. Every row that decodes has room for its token; the caller does all of it and reports
    /// with [`Self::computed`].
    pub(crate) fn plan(&mut self) -> Plan {
        self.make_room();
        self.admit();
        let mut plan = Plan::default();
        let mut budget = self.bounds.chunk_tokens;
        let mut planned: Vec<PromptId> = Vec::new();
        for (index, row) in self.running.iter().enumerate() {
            let prompt = &self.prompts[&row.prompt];
            if row.may_decode() && prompt.is_filled() {
                plan.decode.push(index);
                continue;
            }
            if row.tokens == 0 && prompt.is_filled() {
                plan.joined.push(index);
                continue;
            }
            let (source, start, end) = if prompt.is_filled() {
                (Source::Answer, row.filled, row.behind())
            } else {
                (Source::Prompt, prompt.filled, prompt.tokens)
            };
            let again = source == Source::Prompt && planned.contains(&row.prompt);
            if budget == 0 || again || (self.bounds.one_chunk && !plan.chunks.is_empty()) {
                continue;
            }
            let tokens = (end - start).min(budget);
            budget -= tokens;
            if source == Source::Prompt {
                planned.push(row.prompt);
            }
            plan.chunks.push(Chunk { row: index, source, start, tokens });
        }
        plan
    }

    /// Gives every row that decodes a place for its token, the oldest first; the youngest pay for it.
    fn make_room(&mut self) {
        let mut row = 0;
        while row < self.running.len() {
            let needy = &self.running[row];
            if needy.may_decode() && needy.filled == needy.blocks.len() * BLOCK_TOKENS {
                match self.free.pop() {
                    Some(block) => self.running[row].blocks.push(block),
                    None => {
                        self.preempt();
                        // The same row again, unless it was the youngest itself.
                        continue;
                    }
                }
            }
            row += 1;
        }
    }

    /// Sends the youngest row back to the head of the line.
    fn preempt(&mut self) {
        let Some(row) = self.running.len().checked_sub(1) else { return };
        self.preemptions += 1;
        let Running { age, group, tokens, most_tokens, sample, prompt_tokens, .. } = self.release(row);
        self.waiting.push_front(Waiting { age, group, prompt_tokens, tokens, most_tokens, sample });
    }

    /// Starts waiting samples while there is room for them.
    fn admit(&mut self) {
        // One block for every sample that runs and may need another.
        let mut reserve = self.running.iter().filter(|row| row.may_grow()).count();
        while let Some(next) = self.waiting.front() {
            let own = blocks_of(next.tokens.max(1));
            let joined = self.open.get(&next.group).copied();
            let prompt = if joined.is_some() { 0 } else { blocks_of(next.prompt_tokens) };
            let fits = own + prompt + reserve <= self.free.len();
            if self.running.len() >= self.bounds.rows || !fits {
                return;
            }
            let Some(next) = self.waiting.pop_front() else { return };
            let prompt = joined.unwrap_or_else(|| self.open_prompt(next.group, next.prompt_tokens));
            self.prompts.get_mut(&prompt).expect("an open prompt is there").users += 1;
            let blocks = self.take(own);
            let Waiting { age, group, tokens, most_tokens, sample, prompt_tokens } = next;
            let filled = 0;
            let row = Running { age, group, prompt, prompt_tokens, blocks, tokens, most_tokens, filled, sample };
            reserve += usize::from(row.may_grow());
            self.running.push(row);
        }
    }

    fn open_prompt(&mut self, group: u64, tokens: usize) -> PromptId {
        self.prompt_ids += 1;
        let id = PromptId(self.prompt_ids);
        let blocks = self.take(blocks_of(tokens)).into();
        self.prompts.insert(id, Prompt { group, blocks, tokens, filled: 0, users: 0, kept: P::default() });
        self.open.insert(group, id);
        id
    }

    fn take(&mut self, blocks: usize) -> Vec<u32> {
        self.free.split_off(self.free.len() - blocks)
    }

    /// Takes a row out and frees its blocks, and those of its prompt when nobody else uses it.
    fn release(&mut self, row: usize) -> Running<S> {
        let row = self.running.remove(row);
        self.free.extend(row.blocks.iter().rev());
        let prompt = self.prompts.get_mut(&row.prompt).expect("a running row has its prompt");
        prompt.users -= 1;
        if prompt.users == 0 {
            self.free.extend(prompt.blocks.iter().rev());
            if self.open.get(&prompt.group) == Some(&row.prompt) {
                self.open.remove(&prompt.group);
            }
            self.prompts.remove(&row.prompt);
        }
        row
    }

    /// Notes that a plan was computed.
    pub(crate) fn computed(&mut self, plan: &Plan) -> Computed {
        let mut computed = Computed { completed: Vec::new(), starts: Vec::new() };
        for row in &plan.decode {
            self.running[*row].filled += 1;
        }
        for (place, chunk) in plan.chunks.iter().enumerate() {
            let id = self.running[chunk.row].prompt;
            match chunk.source {
                Source::Answer => self.running[chunk.row].filled += chunk.tokens,
                Source::Prompt => {
                    let prompt = self.prompts.get_mut(&id).expect("a running row has its prompt");
                    prompt.filled += chunk.tokens;
                    if prompt.is_filled() {
                        computed.completed.push((chunk.row, place));
                        let rows = self.running.iter().enumerate();
                        let fresh = rows.filter(|(_, row)| row.prompt == id && row.tokens == 0);
                        computed.starts.extend(fresh.map(|(row, _)| (row, place)));
                    }
                }
            }
        }
        computed
    }

    /// Notes that a row got one more token.
    pub(crate) fn generated(&mut self, row: usize) {
        self.running[row].tokens += 1;
    }

    /// Removes a finished row; later rows move up.
    pub(crate) fn finish(&mut self, row: usize) -> S {
        self.release(row).sample
    }

    /// Takes out all samples of a group.
    pub(crate) fn cancel(&mut self, group: u64) {
        self.waiting.retain(|waiting| waiting.group != group);
        for row in (0..self.running.len()).rev() {
            if self.running[row].group == group {
                self.release(row);
            }
        }
    }

    /// Forgets all rows of all groups.
    pub(crate) fn cancel_all(&mut self) {
        self.waiting.clear();
        for row in (0..self.running.len()).rev() {
            self.release(row);
        }
    }
}

fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

#[cfg(test)]
mod tests;
