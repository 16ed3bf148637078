// Frames of a video or picture, taken by the browser: the file itself never leaves it.
const COUNT = 8;
const LONGEST_SIDE = 448;
const PATIENCE_MS = 2000;
const NO_PATIENCE_MS = 50;

const once = (target, name) =>
  new Promise((resolve, reject) => {
    target.addEventListener(name, resolve, { once: true });
    target.addEventListener("error", () => reject(new Error("this browser cannot play the file")), { once: true });
  });

// Whether a frame near a time (in seconds) comes to be shown: "seeked" alone may find the one before it still in place.
const comes = (video, time, tolerance, patience) =>
  new Promise((resolve) => {
    const look = (_, frame) => {
      if (Math.abs(frame.mediaTime - time) <= tolerance) resolve(true);
      else video.requestVideoFrameCallback(look);
    };
    video.requestVideoFrameCallback?.(look);
    setTimeout(() => resolve(false), patience);
  });

// Frames as base64 JPEG, and the seconds of a video.
export const framesOf = (file) => (file.type.startsWith("image/") ? ofPicture(file) : ofVideo(file));

function painter(width, height) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(28, Math.round(width * scale));
  canvas.height = Math.max(28, Math.round(height * scale));
  return (source) => {
    canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.9).split(",")[1];
  };
}

async function ofPicture(file) {
  const picture = await createImageBitmap(file).catch(() => {
    throw new Error("this browser cannot show the file");
  });
  return { frames: [painter(picture.width, picture.height)(picture)] };
}

async function ofVideo(file) {
  const video = document.createElement("video");
  video.muted = true;
  video.src = URL.createObjectURL(file);
  try {
    await once(video, "loadeddata");
    const jpeg = painter(video.videoWidth, video.videoHeight);
    const frames = [];
    const half = video.duration / (2 * COUNT);
    let patience = PATIENCE_MS;
    for (let i = 0; i < COUNT; i += 1) {
      const time = half * (2 * i + 1);
      const coming = comes(video, time, half, patience);
      video.currentTime = time;
      await once(video, "seeked");
      if (!(await coming)) patience = NO_PATIENCE_MS; // a video of few frames
      frames.push(jpeg(video));
    }
    return { frames, seconds: video.duration };
  } finally {
    URL.revokeObjectURL(video.src);
  }
}
