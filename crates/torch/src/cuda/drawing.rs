//! From logits to tokens. `B` rows, `V` vocabulary.

use tch::{Device, Kind, Tensor};

use super::layer::{dimension, number};
use super::{DeviceKernels, KernelError};
use crate::{Drawn, Filters};

/// What one row of logits is drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDraw {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// What may be drawn.
    pub filters: Filters,
    /// Key of the sample's noise.
    pub noise_key: u64,
    /// Position of the token in its answer, which counts the noise.
    pub position: u64,
}

/// Words of 64 bits that the kernel takes and gives a row.
pub(super) const OPTION_WORDS: usize = 5;
const DRAWN_WORDS: usize = 3;

/// What the rows of a pass are drawn with, on the device.
#[derive(Debug)]
pub struct DrawTable {
    /// `[B, 5]` int64.
    pub(super) words: Tensor,
}

impl DrawTable {
    fn new(rows: &[RowDraw], device: Device) -> Self {
        let words: Vec<i64> = rows.iter().flat_map(RowDraw::words).collect();
        Self { words: Tensor::from_slice(&words).to_device(device).view([rows.len() as i64, OPTION_WORDS as i64]) }
    }
}

/// Most tiles that a row is cut into, and the smallest tile.
const MOST_TILES: usize = 256;
const SMALLEST_TILE: usize = 1024;
const TILE_STEP: usize = 256;
const THREADS: u32 = 512;
/// Bytes of the logits that a thread reads at once.
const LOGIT_PACK_BYTES: usize = 16;

impl DeviceKernels {
    /// Draws one token a row by inverting the cumulative distribution at the uniform number of the row's key and position,
    /// and gives its log-probs. What [`crate::draw`] does in host memory.
    ///
    /// `logits`: `[B, V]` float32, contiguous. Waits for the device.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When there are not as many rows of options as of logits, or the logits are none of these kernels.
    pub fn draw(&self, logits: &Tensor, rows: &[RowDraw]) -> Result<Vec<Drawn>, KernelError> {
        Self::drawn(&self.draw_on_device(logits, &DrawTable::new(rows, logits.device()))?)
    }

    /// The same without a wait for the device: what [`Self::drawn`] reads.
    ///
    /// # Errors
    /// As [`Self::draw`].
    ///
    /// # Panics
    /// As [`Self::draw`].
    pub fn draw_on_device(&self, logits: &Tensor, table: &DrawTable) -> Result<Tensor, KernelError> {
        let (count, vocabulary) = logits.size2().expect("logits are [B, V]");
        self.expect_kind("logits", logits, Kind::Float, &[count, vocabulary]);
        self.expect_kind("options", &table.words, Kind::Int64, &[count, OPTION_WORDS as i64]);
        assert!(count > 0 && vocabulary > 0, "logits {count} x {vocabulary}");
        let drawn = Tensor::empty([count, DRAWN_WORDS as i64], (Kind::Int64, logits.device()));
        let tile = (vocabulary as usize).div_ceil(MOST_TILES).next_multiple_of(TILE_STEP).max(SMALLEST_TILE);
        let packed = packed_logits(logits);
        let arguments = [
            logits.into(),
            (&table.words).into(),
            (&drawn).into(),
            number(vocabulary),
            number(tile as i64),
            i32::from(packed).into(),
        ];
        self.run("draw", [dimension(count as usize), 1, 1], THREADS, &arguments)?;
        Ok(drawn)
    }

    /// What was drawn, once the device has.
    ///
    /// # Errors
    /// When the device fails.
    pub fn drawn(words: &Tensor) -> Result<Vec<Drawn>, KernelError> {
        let words: Vec<i64> = Vec::try_from(words.view([-1])).map_err(|error: tch::TchError| KernelError::Call {
            call: "copy the tokens to the host".to_owned(),
            message: error.to_string(),
        })?;
        Ok(words.as_chunks::<DRAWN_WORDS>().0.iter().map(|words| drawn_of(words.map(i64::cast_unsigned))).collect())
    }
}

impl RowDraw {
    /// What costs least.
    pub(super) const PLAIN: Self = Self { temperature: 1.0, filters: Filters::OFF, noise_key: 0, position: 0 };

    /// The fields of the kernel's `RowOptions`, in their order.
    pub(super) fn words(&self) -> [i64; OPTION_WORDS] {
        let Filters { top_k, top_p, min_p } = self.filters;
        let inverse = (1.0 / self.temperature) as f32;
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.noise_key,
            self.position,
            top_p.to_bits(),
            pair(inverse.to_bits(), (min_p as f32).to_bits()),
            pair(top_k, 0),
        ]
        .map(u64::cast_signed)
    }
}

/// Whether every row of float32 logits, `[B, V]`, begins where a thread may read four of them at once.
pub(super) fn packed_logits(logits: &Tensor) -> bool {
    let is_whole = |bytes: usize| bytes.is_multiple_of(LOGIT_PACK_BYTES);
    let row = logits.size().last().map_or(0, |columns| *columns as usize * size_of::<f32>());
    is_whole(row) && is_whole(logits.data_ptr() as usize)
}

/// The kernel's `Drawn`.
fn drawn_of([token, logprobs, entropy]: [u64; DRAWN_WORDS]) -> Drawn {
    let [low, high] = [logprobs as u32, (logprobs >> 32) as u32].map(f32::from_bits);
    Drawn { token: token as usize, logprob: low, sampled_logprob: high, entropy: f32::from_bits(entropy as u32) }
}
