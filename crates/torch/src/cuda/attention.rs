//! Attention of one new token a row over the blocks of the cache. `B` rows, `N` query heads, `K` key heads, `H` head width,
//! `P` blocks of `S` tokens.

use tch::{Device, Kind, Tensor};

use super::layer::{dimension, number};
use super::{DeviceKernels, KernelError};
use crate::{BLOCK_TOKENS, BlockRow};

/// Warps of a block of the kernel, each of which takes a block of the cache at a time.
const WARPS: usize = 4;
/// Fewest blocks of the cache that are worth a split: two a warp.
const SMALLEST_SPLIT: usize = 2 * WARPS;

/// Which blocks the rows of a pass attend to, on the device: the same for all layers.
#[derive(Debug)]
pub struct DecodeTable {
    /// `[B, longest]` int32: blocks of the prompt, then those of the answer.
    blocks: Tensor,
    /// `[B, 3]` int32: blocks of the prompt, its tokens, tokens of the answer.
    runs: Tensor,
    rows: usize,
    longest: usize,
    largest: u32,
}

impl DecodeTable {
    /// The table of some rows, none of them empty.
    ///
    /// # Panics
    /// When a row has no tokens, or fewer blocks than they take.
    #[must_use]
    pub fn new(rows: &[BlockRow<'_>], device: Device) -> Self {
        let used = |row: &BlockRow<'_>| {
            let blocks = row.map(|run| {
                let blocks = run.tokens.div_ceil(BLOCK_TOKENS);
                assert!(blocks <= run.blocks.len(), "{} tokens in {} blocks", run.tokens, run.blocks.len());
                blocks
            });
            assert!(blocks != [0, 0], "a row has no tokens");
            blocks
        };
        let used: Vec<[usize; 2]> = rows.iter().map(used).collect();
        let longest = used.iter().map(|used| used[0] + used[1]).max().unwrap_or(0);
        let (mut table, mut runs, mut largest) = (vec![0i32; rows.len() * longest], Vec::new(), 0);
        for (place, (row, used)) in rows.iter().zip(&used).enumerate() {
            let blocks = row.iter().zip(used).flat_map(|(run, used)| &run.blocks[..*used]);
            for (to, block) in table[place * longest..].iter_mut().zip(blocks) {
                *to = i32::try_from(*block).expect("a cache has fewer than 2^31 blocks");
                largest = largest.max(*block);
            }
            let count = |tokens: usize| i32::try_from(tokens).expect("a row has fewer than 2^31 tokens");
            runs.extend([count(used[0]), count(row[0].tokens), count(row[1].tokens)]);
        }
        let upload = |values: &[i32], columns: usize| {
            Tensor::from_slice(values).to_device(device).view([rows.len() as i64, columns as i64])
        };
        Self { blocks: upload(&table, longest), runs: upload(&runs, 3), rows: rows.len(), longest, largest }
    }
}

/// Where new tokens go, on the device: the same for all layers.
#[derive(Debug)]
pub struct DecodeSlots {
    /// `[T, 2]` int32: block and place.
    slots: Tensor,
    largest: u32,
}

impl DecodeSlots {
    /// Block and place of each token.
    ///
    /// # Panics
    /// When a place lies outside of a block.
    #[must_use]
    pub fn new(slots: &[(u32, u32)], device: Device) -> Self {
        let number = |value: u32| i32::try_from(value).expect("a cache has fewer than 2^31 blocks");
        assert!(slots.iter().all(|slot| (slot.1 as usize) < BLOCK_TOKENS), "a block has {BLOCK_TOKENS} places");
        let values: Vec<i32> = slots.iter().flat_map(|slot| [number(slot.0), number(slot.1)]).collect();
        let largest = slots.iter().map(|slot| slot.0).max().unwrap_or(0);
        Self { slots: Tensor::from_slice(&values).to_device(device).view([slots.len() as i64, 2]), largest }
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.slots
    }

    /// Refuses slots beyond so many blocks.
    pub(super) fn expect_within(&self, blocks: i64) {
        assert!(i64::from(self.largest) < blocks, "block {} of {blocks}", self.largest);
    }
}

impl DeviceKernels {
    /// Attention of one query a row; each key and value is read once for the query heads of its group that are computed
    /// together. Where rows are few, each is divided along its tokens.
    ///
    /// `q`: `[B, N, H]`, rotated, contiguous; `keys`: `[P, K, H, S]` and `values`: `[P, K, S, H]` of one layer. Scores and
    /// sums are float32. Returns `[B, N H]`.
    ///
    /// # Errors
    /// When a launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels, or the table names a block that is not there.
    pub fn attend_blocks(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        table: &DecodeTable,
    ) -> Result<Tensor, KernelError> {
        let shape = self.shape();
        let [n, k, h, s] = [shape.heads, shape.kv_heads, shape.head_dim, BLOCK_TOKENS].map(|size| size as i64);
        let (rows, blocks) = (table.rows as i64, keys.size()[0]);
        self.expect("queries", q, &[rows, n, h]);
        self.expect("keys", keys, &[blocks, k, h, s]);
        self.expect("values", values, &[blocks, k, s, h]);
        assert!(i64::from(table.largest) < blocks, "block {} of {blocks}", table.largest);
        let units = table.rows * shape.heads / shape.together();
        let splits = self.splits(units, table.longest);
        let output = Tensor::empty([rows, n * h], (q.kind(), q.device()));
        // Where nothing is split nothing is written to these.
        let parts = if splits == 1 { 0 } else { rows * n * splits as i64 };
        let partial = Tensor::empty([parts, h], (Kind::Float, q.device()));
        let states = Tensor::empty([parts, 2], (Kind::Float, q.device()));
        let arguments = [
            q.into(),
            (n * h).into(),
            keys.into(),
            values.into(),
            (&table.blocks).into(),
            number(table.longest as i64),
            (&table.runs).into(),
            (&output).into(),
            (&partial).into(),
            (&states).into(),
            number(k),
            (1.0 / (h as f32).sqrt()).into(),
        ];
        let grid = [dimension(table.rows), dimension(shape.heads / shape.together()), dimension(splits)];
        self.run("attend_blocks", grid, 32 * WARPS as u32, &arguments)?;
        if splits > 1 {
            let arguments = [(&partial).into(), (&states).into(), (&output).into(), number(splits as i64)];
            let threads = dimension(shape.head_dim.next_multiple_of(32));
            self.run("combine_splits", [dimension(table.rows), dimension(shape.heads), 1], threads, &arguments)?;
        }
        Ok(output)
    }

    /// Into how many parts rows are divided along their tokens, so that two blocks of the kernel are there for every
    /// processor, and none of them has next to nothing to do.
    fn splits(&self, units: usize, longest: usize) -> usize {
        let wanted = (2 * self.machine.processors() as usize).div_ceil(units.max(1));
        wanted.min(longest / SMALLEST_SPLIT).max(1)
    }
}
