//! What a connection writes in one turn leaves in one piece.
//!
//! h2 flushes between the data of an answer and its trailers: a unary call would cost a second TLS record, a second system
//! call and a segment of its own for ten octets. Here a flush is put off to the connection's next turn, which it asks for
//! at once; what was written meanwhile goes with it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Octets from which on waiting for more is not worth it: one TLS record.
const PIECE_BYTES_MAX: usize = 16 * 1024;

/// A stream whose writes wait for the turn after them.
#[derive(Debug)]
pub(crate) struct Coalesced<S> {
    stream: S,
    waiting: Vec<u8>,
    /// Something was written since the last flush.
    fresh: bool,
}

impl<S: AsyncWrite + Unpin> Coalesced<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, waiting: Vec::new(), fresh: false }
    }

    /// Hands all that waits to the stream. Its memory goes too: most connections are idle most of the time.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut sent = 0;
        while sent < self.waiting.len() {
            match Pin::new(&mut self.stream).poll_write(context, &self.waiting[sent..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => sent += count,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.waiting.drain(..sent);
                    return Poll::Pending;
                }
            }
        }
        self.waiting = Vec::new();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.waiting.len() + bytes.len() > PIECE_BYTES_MAX {
            ready!(self.poll_drain(context))?;
        }
        if bytes.len() >= PIECE_BYTES_MAX {
            return Pin::new(&mut self.stream).poll_write(context, bytes);
        }
        self.waiting.extend_from_slice(bytes);
        self.fresh = true;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.fresh) {
            context.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use proptest::prelude::*;

    use super::*;

    /// Takes as much at a time as it is told, `None` being not now; everything once it was told all.
    #[derive(Default)]
    struct Slow {
        takes: VecDeque<Option<usize>>,
        pieces: Vec<Vec<u8>>,
        flushes: usize,
        is_shut: bool,
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = match self.takes.pop_front() {
                Some(None) => {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Some(Some(count)) => count.min(bytes.len()),
                None => bytes.len(),
            };
            self.pieces.push(bytes[..count].to_vec());
            Poll::Ready(Ok(count))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.flushes += 1;
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.is_shut = true;
            Poll::Ready(Ok(()))
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn data_and_trailers_of_one_turn_leave_together_in_the_next() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let mut context = Context::from_waker(&waker);
        let mut stream = Coalesced::new(Slow::default());
        for part in ["data, ", "trailers"] {
            let written = Pin::new(&mut stream).poll_write(&mut context, part.as_bytes());
            assert!(matches!(written, Poll::Ready(Ok(count)) if count == part.len()));
            assert!(Pin::new(&mut stream).poll_flush(&mut context).is_ready());
        }
        assert!(stream.stream.pieces.is_empty(), "the turn is not over");
        assert!(wakes.0.load(Ordering::Relaxed) > 0, "another turn was asked for");

        assert!(Pin::new(&mut stream).poll_flush(&mut context).is_ready());
        assert_eq!(stream.stream.pieces, [b"data, trailers".to_vec()]);
        assert_eq!(stream.stream.flushes, 1);
        assert_eq!(stream.waiting.capacity(), 0, "an idle connection keeps no memory for this");
    }

    proptest! {
        /// Writes as an HTTP/2 connection makes them, on a stream that takes them at its own pace.
        #[test]
        fn no_octet_is_lost_or_moved(
            writes in prop::collection::vec((1..40_000_usize, any::<bool>()), 1..20),
            takes in prop::collection::vec(prop::option::of(1..30_000_usize), 0..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (sent, stream) = runtime.block_on(async {
                use tokio::io::AsyncWriteExt as _;
                let mut stream = Coalesced::new(Slow { takes: takes.into(), ..Slow::default() });
                let mut sent = Vec::new();
                for (number, (length, flush)) in writes.into_iter().enumerate() {
                    let bytes = vec![u8::try_from(number).unwrap(); length];
                    stream.write_all(&bytes).await.unwrap();
                    sent.extend(bytes);
                    if flush {
                        // Twice: put off, then done.
                        stream.flush().await.unwrap();
                        stream.flush().await.unwrap();
                        prop_assert_eq!(stream.stream.pieces.concat().len(), sent.len());
                    }
                }
                stream.shutdown().await.unwrap();
                Ok((sent, stream.stream))
            })?;
            prop_assert!(stream.is_shut);
            prop_assert_eq!(stream.pieces.concat(), sent);
        }
    }
}
